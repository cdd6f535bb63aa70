// The game: puts the photo and the lookalike side by side in a random order, and says which one was chosen.
const score = { right: 0, played: 0 };
function deal() {
  const game = element.querySelector('.game');
  if (!game) return;
  const shown = document.querySelector('#shown .match');
  if (!shown || shown.dataset.key !== game.dataset.key) { setTimeout(deal, 50); return; }
  const pictures = ['over', 'under'].map((kind) => [kind, shown.querySelector(`.stack .${kind}`).src]);
  if (Math.random() < 0.5) pictures.reverse();
  game.querySelectorAll('.two button').forEach((button, k) => {
    [button.dataset.kind, button.querySelector('img').src] = pictures[k];
    button.removeAttribute('aria-pressed');
  });
  game.classList.remove('told');
}
element.addEventListener('click', (e) => {
  const game = element.querySelector('.game'), button = e.target.closest('button');
  if (!button) return;
  if (button.matches('.next')) {
    const others = document.querySelectorAll('#gallery button[aria-pressed=false]');
    if (others.length) others[Math.floor(Math.random() * others.length)].click(); else deal();
    return;
  }
  if (game.classList.contains('told')) return;
  const right = button.dataset.kind === 'over';
  score.played += 1; score.right += right;
  button.setAttribute('aria-pressed', 'true');
  game.classList.add('told');
  const told = right ? game.dataset.right : game.dataset.wrong;
  game.querySelector('.answer').textContent = `${told} ${score.right} of ${score.played} so far.`;
});
watch('value', deal);
deal();
