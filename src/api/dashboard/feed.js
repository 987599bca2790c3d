// Where the data come from: answers asked for again and again while somebody looks, and the stream of events.
// URLs are relative, so the page works behind a proxy that serves it under another path.

/** Asks now and `every` so many milliseconds after each answer; not while the page is hidden. */
export function poll(url, every, patience, onAnswer, onSilence) {
  let timer = null;
  let asking = false;

  async function ask() {
    clearTimeout(timer);
    timer = null;
    if (asking || document.visibilityState !== "visible") return;
    asking = true;
    let answer;
    try {
      const response = await fetch(url, { cache: "no-store", signal: AbortSignal.timeout(patience) });
      if (!response.ok) throw new Error(`status ${response.status}`);
      answer = await response.json();
    } catch {
      onSilence?.();
    }
    asking = false;
    // What draws is outside the try: its errors belong in the console, not among the silences.
    timer = setTimeout(ask, every);
    if (answer) onAnswer(answer);
  }

  document.addEventListener("visibilitychange", ask);
  ask();
}

/** The stream of events. Browsers connect again by themselves after a broken connection, but not after an
 * answer that is no stream, such as one of a proxy in front of an agent that is gone. */
export function listen(url, onEvent, onOpen) {
  const source = new EventSource(url);
  source.onopen = onOpen;
  source.onmessage = ({ data }) => {
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      return;
    }
    onEvent(event);
  };
  source.onerror = () => {
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000, url, onEvent, onOpen);
  };
}
