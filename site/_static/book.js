// A box that scrolls sideways must be reachable with the keyboard: then the arrow keys move it.
const boxes = 'article pre, article .table-wrapper, .cell_output .output, article div.math'
const reach = () => document.querySelectorAll(boxes).forEach(box =>
  box.scrollWidth > box.clientWidth ? box.tabIndex = 0 : box.removeAttribute('tabindex'))
addEventListener('load', () => window.MathJax?.Hub ? MathJax.Hub.Queue(reach) : reach())
addEventListener('resize', reach)

// On a narrow screen the theme's menus are labels of hidden boxes: make them buttons for the keyboard too.
for (const [box, name] of [['__navigation', 'Chapters'], ['__toc', 'Contents of this page']])
  document.querySelectorAll(`label[for=${box}]:not(.overlay)`).forEach(label => {
    Object.assign(label, {tabIndex: 0, role: 'button', ariaLabel: name})
    label.addEventListener('keydown', e => { if ([' ', 'Enter'].includes(e.key)) { e.preventDefault(); label.click() } })
  })

// After a search, Sphinx marks its words on the page. Not single letters; and in a drawing's title it would stumble.
document.querySelectorAll('body > svg title').forEach(o => o.remove())
const asked = localStorage.getItem('sphinx_highlight_terms')?.split(' ').filter(o => o.length > 2)
if (asked) localStorage.setItem('sphinx_highlight_terms', asked.join(' '))
