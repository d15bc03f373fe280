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

export function drawRibbons(svg, received, { scale, sourceCentres, classCentres, height, isOn }) {
  svg.setAttribute("viewBox", `0 0 100 ${height}`);
  const number = sourceCentres.length * classCentres.length;
  while (svg.childElementCount < number) svg.append(document.createElementNS(SVG, "path"));
  while (svg.childElementCount > number) svg.lastChild.remove();
  const widths = received.map((row) => row.map((value) => Math.max(0, value) * scale));
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const starts = widths.map((row, source) => sourceCentres[source] - total(row) / 2);
  const ends = classCentres.map((centre, o) => centre - total(widths.map((row) => row[o])) / 2);
  const paths = svg.children;
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
