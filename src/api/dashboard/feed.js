// Data sources: periodic requests while the page is visible, and the event stream. URLs are relative, so
// the page also works behind a proxy that serves it under another path.

/** Requests `url` now and `every` milliseconds after each answer, except while the page is hidden. */
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
    // Drawing is outside the `try`, so that its errors reach the console instead of counting as no
    // answer.
    timer = setTimeout(ask, every);
    if (answer) onAnswer(answer);
  }

  document.addEventListener("visibilitychange", ask);
  ask();
}

/** Opens the event stream. Browsers reconnect after a broken connection, but not after a response that is no
 * stream, such as that of a proxy while the agent is gone. */
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
