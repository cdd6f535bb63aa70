// The strip of matches: tells the page which one was chosen, and marks it.
element.addEventListener('click', (e) => {
  const button = e.target.closest('button[data-key]');
  if (!button) return;
  element.querySelectorAll('button[data-key]').forEach((b) => b.setAttribute('aria-pressed', b === button));
  trigger('click', { key: button.dataset.key });
});
