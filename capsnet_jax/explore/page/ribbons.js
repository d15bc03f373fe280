// Ribbons from sources on the left to classes on the right, in a box of width 100.

const SVG = "http://www.w3.org/2000/svg";
const THINNEST = 0.1; // pixels

// Units of length for each unit of what classes receive, so that all steps fit and can be compared.
export function scaleOf(steps, sourceHeight, classHeight) {
  let scale = Infinity;
  for (const received of steps) {
    const bySource = received.map((row) => row.reduce((sum, value) => sum + Math.max(0, value), 0));
    const byClass = received[0].map((_, o) => received.reduce((sum, row) => sum + Math.max(0, row[o]), 0));
    scale = Math.min(scale, sourceHeight / Math.max(...bySource, 1e-9), classHeight / Math.max(...byClass, 1e-9));
  }
  return scale;
}

// Draws ribbons, and at each class a line as long as all its ribbons are wide in the first step.
export function drawRibbons(svg, received, { first, scale, sourceCentres, classCentres, height, isOn }) {
  svg.setAttribute("viewBox", `0 0 100 ${height}`);
  const widthsOf = (values) => values.map((row) => row.map((value) => Math.max(0, value) * scale));
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const atClass = (widths, o) => total(widths.map((row) => row[o]));
  const widths = widthsOf(received);
  const starts = widths.map((row, source) => sourceCentres[source] - total(row) / 2);
  const ends = classCentres.map((centre, o) => centre - atClass(widths, o) / 2);
  const paths = children(svg, "path", sourceCentres.length * classCentres.length);
  children(svg, "line", classCentres.length).forEach((line, o) => {
    const half = atClass(widthsOf(first), o) / 2;
    const ends = { x1: 100, x2: 100, y1: classCentres[o] - half, y2: classCentres[o] + half };
    for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value);
  });
  for (let source = 0; source < sourceCentres.length; source++) {
    for (let o = 0; o < classCentres.length; o++) {
      const path = paths[source * classCentres.length + o];
      const width = widths[source][o];
      const [from, to] = [starts[source], ends[o]];
      path.setAttribute("d", width < THINNEST ? "" : `M0 ${from}C50 ${from} 50 ${to} 100 ${to}v${width}` +
        `C50 ${to + width} 50 ${from + width} 0 ${from + width}Z`);
      path.classList.toggle("on", isOn(o));
      starts[source] += width;
      ends[o] += width;
    }
  }
}

// The children of an element with a name, of which there are then so many.
function children(svg, name, number) {
  const found = [...svg.querySelectorAll(name)];
  while (found.length < number) found.push(svg.appendChild(document.createElementNS(SVG, name)));
  for (const extra of found.splice(number)) extra.remove();
  return found;
}
