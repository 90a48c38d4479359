// Search, theme switch and the menu on a narrow screen; `pages` is written above by tools/render_docs.py.
const root = document.documentElement, saved = (() => { try { return localStorage.getItem('theme') } catch (e) { return null } })();
if (saved) root.dataset.theme = saved;
const dark = () => root.dataset.theme ? root.dataset.theme == 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
document.getElementById('theme').onclick = () => {
  root.dataset.theme = dark() ? 'light' : 'dark';
  try { localStorage.setItem('theme', root.dataset.theme) } catch (e) { /* private window: the choice lasts for this page */ }
};
const menu = document.getElementById('menu');
menu.onclick = () => menu.setAttribute('aria-expanded', document.body.classList.toggle('menu'));
document.querySelector('#sidebar [aria-current]')?.scrollIntoView({block: 'center'});
window.scrollTo(0, location.hash ? window.scrollY : 0);

const box = document.getElementById('search'), found = document.getElementById('found'), up = document.body.dataset.up;
const row = p => {
  const a = document.createElement('a'), s = document.createElement('small');
  a.href = up + p.h + (p.i ? '#' + p.i : '');
  a.textContent = p.s ? p.t + ' › ' + p.s : p.t;
  s.textContent = p.cut;
  a.append(s);
  return a;
};
box.oninput = () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(w => w);
  found.hidden = !words.length;
  const hits = pages.map(p => {
    const head = (p.t + ' ' + p.s).toLowerCase(), all = head + ' ' + p.x.toLowerCase();
    if (!words.every(w => all.includes(w))) return null;
    const at = Math.max(0, p.x.toLowerCase().indexOf(words[0]) - 50);
    return {...p, score: words.filter(w => head.includes(w)).length, cut: (at ? '…' : '') + p.x.slice(at, at + 150)};
  }).filter(p => p).sort((a, b) => b.score - a.score).slice(0, 12);
  found.replaceChildren(...hits.map(row));
  if (!hits.length) { const p = document.createElement('p'); p.textContent = 'Nothing found'; found.append(p); }
};
document.addEventListener('keydown', e => {
  if (e.key == '/' && document.activeElement != box) { e.preventDefault(); box.focus(); }
  if (e.key == 'Escape') { box.value = ''; found.hidden = true; }
});
