// How Sphinx' search weighs what it finds: first the name itself, then titles, then arguments of that name, then names
// that contain it, then text. Among equals the order of the book decides: find.py numbers names and, from 1000 on,
// arguments by their page. A hyphen in the question may be an underscore in the name.
var Scorer = {
  score: ([, title, , , score, , kind]) => {
    const asked = new URLSearchParams(location.search).get('q').trim().toLowerCase().replace(/[-\s]/g, '_')
    return score + (kind === 'object' && asked.includes('_') && title.toLowerCase().split('.').pop() === asked ? 30 : 0)
  },
  objNameMatch: 30, objPartialMatch: 9,
  objPrio: Object.fromEntries(Array.from({length: 2000}, (_, i) => [i, i < 1000 ? -i / 1000 : -18 - i / 1000])),
  objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
}
