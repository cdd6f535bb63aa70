// Moves the frames of a walk: plays there and back, pauses, seeks. One listener on the element, which outlives its content.
const state = { timer: null, way: 1 };
const parts = () => element.querySelector('.player .play') && element.querySelector('.player');
function show(k) {
  const player = parts();
  if (!player) return;
  const frames = player.querySelectorAll('.frames img');
  k = Math.max(0, Math.min(frames.length - 1, k));
  frames.forEach((img, i) => { img.hidden = i !== k; });
  player.dataset.at = k;
  const told = player.querySelectorAll('.texts li')[k].textContent;
  player.querySelector('.seek').value = k;
  player.querySelector('.seek').setAttribute('aria-valuetext', `${k + 1} of ${frames.length}: ${told}`);
  player.querySelector('.now').textContent = told;
  const line = player.querySelector('polyline.one'), mark = player.querySelector('.mark');
  const at = line && mark && line.getAttribute('points').split(' ')[k];
  if (at) { const [x, y] = at.split(','); mark.setAttribute('cx', x); mark.setAttribute('cy', y); }
}
function stop() {
  clearTimeout(state.timer); state.timer = null;
  const button = element.querySelector('.play');
  if (button) { button.textContent = 'Play'; button.setAttribute('aria-pressed', 'false'); }
}
function step() {
  const now = parts();
  if (!now) { stop(); return; }
  const last = now.querySelectorAll('.frames img').length - 1;
  let rest = 130;
  if (now.offsetParent) {  // not while another tab is shown
    const at = +now.dataset.at;
    if (at >= last) state.way = -1; else if (at <= 0) state.way = 1;
    show(at + state.way);
    if ([0, last].includes(+now.dataset.at)) rest = 1100;
  }
  state.timer = setTimeout(step, rest);
}
function play() {
  const button = parts().querySelector('.play');
  button.textContent = 'Pause'; button.setAttribute('aria-pressed', 'true');
  state.timer = setTimeout(step, 600);
}
element.addEventListener('input', (e) => { if (e.target.matches('.seek')) { stop(); show(+e.target.value); } });
element.addEventListener('click', (e) => { if (e.target.closest('.play')) { state.timer ? stop() : play(); } });
watch('value', () => {
  stop();
  if (parts() && !matchMedia('(prefers-reduced-motion: reduce)').matches) play();
});
