// Sends requests to the server. In a page without a server, another file of this name answers them; see ../static.

export function send(path, body) {
  return fetch(path, body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}
