// Small photos to take, and the link to copy.
element.addEventListener('click', (e) => {
  const photo = e.target.closest('button[data-key]');
  const copy = e.target.closest('button[data-link]');
  if (photo) trigger('click', { key: photo.dataset.key });
  if (copy) {
    navigator.clipboard.writeText(new URL(copy.dataset.link, window.location.href).href)
      .then(() => { copy.textContent = 'Copied'; }, () => { copy.textContent = 'Copy it from the address of the link'; });
  }
});
