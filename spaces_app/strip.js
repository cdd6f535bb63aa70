// The strip of matches: tells the page which one was chosen, marks it, and goes to it unless the game has chosen.
element.addEventListener('click', (e) => {
  const button = e.target.closest('button[data-key]');
  if (!button) return;
  element.querySelectorAll('button[data-key]').forEach((b) => b.setAttribute('aria-pressed', b === button));
  if (e.isTrusted) document.getElementById('shown').scrollIntoView();
  trigger('click', { key: button.dataset.key });
});
