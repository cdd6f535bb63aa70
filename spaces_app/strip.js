// The strip of matches: tells the page which one was chosen, marks it, and goes to it unless the game has chosen.
const first = element.querySelector('[aria-pressed=true]')?.dataset.key;
function choose(key) {
  element.querySelectorAll('button[data-key]').forEach((b) => b.setAttribute('aria-pressed', b.dataset.key === key));
  trigger('click', { key });
}
element.addEventListener('click', (e) => {
  const button = e.target.closest('button[data-key]');
  if (!button) return;
  if (e.isTrusted) document.getElementById('shown').scrollIntoView();
  keepInLink({ match: button.dataset.key }, true);
  choose(button.dataset.key);
});
// Back and forward lead to the tab and the pair of the address; to another dataset only by its link.
window.addEventListener('popstate', () => {
  const asked = new URLSearchParams(location.search), tab = asked.get('tab') || 'look', key = asked.get('match') || first;
  document.querySelector(`#tabs [data-tab-id="${CSS.escape(tab)}"]`)?.click();
  const shown = document.querySelector('#shown .match').dataset;
  if (tab === 'melt') return;
  if ((asked.get('dataset') || '') !== shown.dataset) location.reload();
  else if (key !== element.querySelector('[aria-pressed=true]')?.dataset.key) choose(key);
});
