// Keeps the match that is shown in the address of the page.
watch('value', () => {
  const match = element.querySelector('.match');
  if (match) keepInLink({ match: match.dataset.key, dataset: match.dataset.dataset });
});
