// Small photos to take, the link to copy, the address of the page, and the way to what is made.
let shown;
new MutationObserver(() => {
  const link = element.querySelector('.link a');
  document.getElementById('two').inert = !!element.querySelector('.going');  // the photos are in use
  const now = link ? link.href : element.querySelector('.live') ? 'live' : element.querySelector('.verdict') && 'begun';
  if (now === shown) return;
  shown = now;
  if (!link) return now && document.getElementById('go').scrollIntoView();
  keepInLink({ tab: 'make', made: new URL(link.href).searchParams.get('made') });
  element.querySelector('.outcome').focus({ preventScroll: true });
  element.querySelector('.outcome').scrollIntoView();
}).observe(element, { childList: true, subtree: true });
element.addEventListener('click', (e) => {
  const photo = e.target.closest('button[data-key]');
  const copy = e.target.closest('button[data-link]');
  if (photo) trigger('click', { key: photo.dataset.key });
  if (copy) {
    navigator.clipboard.writeText(new URL(copy.dataset.link, window.location.href).href)
      .then(() => { copy.textContent = 'Copied'; }, () => { copy.textContent = 'Copy it from the address of the link'; });
  }
});
