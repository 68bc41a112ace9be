/** Stopping by an AbortSignal, which may be left out. */

/** Whether a signal was given, once the messages that wait have been heard. */
export async function isAborted(signal) {
  if (!signal || signal.aborted) return Boolean(signal?.aborted);
  const { port1, port2 } = new MessageChannel();
  await new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
  port1.close();
  return signal.aborted;
}

/** Throw the signal's reason if it was given: there is nothing yet that could be returned. */
export async function proceed(signal) {
  if (await isAborted(signal)) throw signal.reason;
}
