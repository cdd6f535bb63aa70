// Moves the frames of a walk: play, pause, seek. One listener on the element, which outlives its content.
const state = { timer: null };
const parts = () => element.querySelector('.player');
function show(k) {
  const player = parts();
  if (!player) return;
  const frames = player.querySelectorAll('.frames img');
  k = Math.max(0, Math.min(frames.length - 1, k));
  frames.forEach((img, i) => { img.hidden = i !== k; });
  player.dataset.at = k;
  player.querySelector('.seek').value = k;
  player.querySelector('.seek').setAttribute('aria-valuetext', player.querySelectorAll('.texts li')[k].textContent);
  player.querySelector('.now').textContent = player.querySelectorAll('.texts li')[k].textContent;
  const line = player.querySelector('polyline.one'), mark = player.querySelector('.mark');
  const at = line && mark && line.getAttribute('points').split(' ')[k];
  if (at) { const [x, y] = at.split(','); mark.setAttribute('cx', x); mark.setAttribute('cy', y); }
}
function stop() {
  clearInterval(state.timer); state.timer = null;
  const button = element.querySelector('.play');
  if (button) { button.textContent = 'Play'; button.setAttribute('aria-pressed', 'false'); }
}
function play() {
  const player = parts(), last = player.querySelectorAll('.frames img').length - 1;
  if (+player.dataset.at >= last) show(0);
  const button = player.querySelector('.play');
  button.textContent = 'Pause'; button.setAttribute('aria-pressed', 'true');
  state.timer = setInterval(() => {
    const now = parts();
    if (!now || +now.dataset.at >= last) { stop(); return; }
    show(+now.dataset.at + 1);
  }, 160);
}
element.addEventListener('input', (e) => { if (e.target.matches('.seek')) { stop(); show(+e.target.value); } });
element.addEventListener('click', (e) => { if (e.target.closest('.play')) { state.timer ? stop() : play(); } });
watch('value', stop);
