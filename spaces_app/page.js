// Keeps the state of the page in its address, so that a link leads back to it. An empty value leaves the address. The
// Back button undoes a `step`.
let pair = {};  // of the first tab; the film of Melt has none
window.keepInLink = (changes, step = false) => {
  if ('tab' in changes && !window.linkRead) return;  // the first tab opens itself before the link is read
  if ('match' in changes) pair = { ...pair, ...changes };
  const url = new URL(location.href), before = `${url.searchParams}`;
  const melts = (changes.tab ?? url.searchParams.get('tab')) === 'melt';
  for (const [name, value] of Object.entries({ ...pair, ...changes, ...(melts && { match: '', dataset: '' }) })) {
    if (value) url.searchParams.set(name, value); else url.searchParams.delete(name);
  }
  if (`${url.searchParams}` !== before) history[step ? 'pushState' : 'replaceState'](history.state, '', url);
  // the page of a Space shows the app in a frame and takes the address from it
  const kept = new URLSearchParams([...url.searchParams].filter(([name]) => !name.startsWith('__')));
  if (window.parent !== window) window.parent.postMessage({ queryString: `${kept}`, hash: '' }, 'https://huggingface.co');
};
// Takes the first screen, which is there before the app, away once the app shows the same.
document.addEventListener('DOMContentLoaded', () => {
  const first = document.getElementById('first');
  if (!first) return;
  const same = `gradio-app #shown .match[data-key="${CSS.escape(first.querySelector('.match').dataset.key)}"]`;
  const look = new MutationObserver(() => {
    if (!document.querySelector(same)) return;
    first.remove();
    look.disconnect();
  });
  look.observe(document.querySelector('gradio-app'), { childList: true, subtree: true });
});
// Chooses tabs by arrow keys, as readers of the screen announce it.
document.addEventListener('keydown', (e) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key], tabs = [...(e.target.closest('[role=tablist]')?.children ?? [])];
  const at = tabs.indexOf(e.target);
  if (!step || at < 0) return;
  const next = tabs[(at + step + tabs.length) % tabs.length];
  next.focus();
  next.click();
});
