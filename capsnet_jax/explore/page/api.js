// Requests to the server. While it does not answer, the page says so and tries again.

import { send } from "./send.js";

const RETRY = 2000; // milliseconds

export class Refused extends Error {} // the server answered with a message
export class Unreachable extends Error {}

export async function ask(path, body) {
  let response;
  try {
    response = await send(path, body);
  } catch {
    throw new Unreachable("The server does not answer. Is capsnet explore still running? Trying again …");
  }
  const answer = await response.json().catch(() => ({ error: `The server answered with status ${response.status}.` }));
  if ("error" in answer) throw new Refused(answer.error);
  return answer;
}

export async function untilReachable(path) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, RETRY));
    try {
      return await ask(path);
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
    }
  }
}
