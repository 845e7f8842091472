"The built site as a reader's browser sees it: real Chromium, a local server, and no other host to be reached."
import functools, http.server, re, shutil, subprocess, sys, threading
from collections import namedtuple
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import nbformat, pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'site'))
from book import docs, nbs, page as page_name, sections

notebooks = {page_name(o): nbs/o for _, names in sections() for o in names}
each_page = pytest.mark.parametrize('name', [*notebooks, 'search'])
each_chapter = pytest.mark.parametrize('name', notebooks)
budget = {'index': 1_000_000}
offline = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
           '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
Seen = namedtuple('Seen', 'page log requests size ids links')

formulas_done = """() => new Promise(done => {
    if (!document.querySelector('.math.notranslate')) return done(true)
    const wait = () => window.MathJax?.isReady ? MathJax.Hub.Queue(() => done(true)) : setTimeout(wait, 50)
    wait() })"""

# Text nodes that a reader sees as prose: not in code, not MathJax's own.
prose = """() => {
    const walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT), found = []
    while (walk.nextNode()) {
        const el = walk.currentNode.parentElement
        if (!el.closest('pre, code, script, style, .MathJax, .MJX_Assistive_MathML'))
            found.push(walk.currentNode.data) }
    return found.join(' ') }"""

# The lowest contrast of any visible text with the colour behind it (WCAG), as [ratio, text].
contrast = """() => {
    const ctx = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true})
    const rgba = css => { ctx.clearRect(0, 0, 1, 1); ctx.fillStyle = css; ctx.fillRect(0, 0, 1, 1)
                          const d = ctx.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255] }
    const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
    const paper = el => rgba(getComputedStyle(el).backgroundColor)
    const behind = el => !el ? [255, 255, 255, 1] : over(paper(el), behind(el.parentElement))
    const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
    const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2])
    const seen = el => el.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})
                       && !el.closest('script, style, svg, .MJX_Assistive_MathML, .skip-to-content')
    let worst = [21, '']
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walk.nextNode()) {
        const el = walk.currentNode.parentElement, text = walk.currentNode.data.trim()
        if (!text || !seen(el)) continue
        const back = behind(el), a = light(back), b = light(over(rgba(getComputedStyle(el).color), back))
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
        if (ratio < worst[0]) worst = [ratio, el.tagName + '.' + el.className + ': ' + text.slice(0, 60)] }
    return worst }"""


# What sticks out of the window to the right and is in no box that scrolls by itself.
too_wide = """() => [...document.querySelectorAll('article *')].filter(el => {
    if (el.getBoundingClientRect().right <= innerWidth + 1 || el.closest('.MJX_Assistive_MathML, svg')) return false
    for (let o = el; o.tagName != 'ARTICLE'; o = o.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(o).overflowX)) return false
    return true }).map(el => el.outerHTML.slice(0, 120))"""


@pytest.fixture(scope='session')
def site():
    "The address of a local server over a fresh `_docs/`; a site that is fresh already takes a few seconds."
    subprocess.run([sys.executable, root/'site/build.py', '--no-quarto'], check=True)
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *args: None})
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=docs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='session')
def browser():
    chromium = shutil.which('chromium')
    if not chromium: pytest.fail("The site is tested in Debian's browser, which is not here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=offline)
        yield browser
        browser.close()


@pytest.fixture(scope='session')
def seen(site, browser):
    "Each page opened once, formulas set, with everything the browser fetched and said on the way."
    @functools.cache
    def visit(name):
        context = browser.new_context(viewport={'width': 1280, 'height': 900})
        page, log, requests = context.new_page(), [], []
        page.on('console', lambda o: log.append(f'{o.type}: {o.text}') if o.type in ('error', 'warning') else None)
        page.on('pageerror', lambda o: log.append(f'page error: {o}'))
        page.on('requestfailed', lambda o: log.append(f'failed: {o.url[:200]}'))
        page.on('response', lambda o: log.append(f'{o.status}: {o.url}') if o.status >= 400 else None)
        page.on('request', lambda o: requests.append(o))
        page.goto(f'{site}{name}.html', wait_until='networkidle')
        page.evaluate(formulas_done)
        page.wait_for_load_state('networkidle')
        sizes = [o.sizes() for o in requests if o.url.startswith(site)]
        size = sum(o['responseBodySize'] + o['responseHeadersSize'] for o in sizes)
        ids = set(page.evaluate("() => [...document.querySelectorAll('[id]')].map(o => o.id)"))
        links = page.evaluate("() => [...document.querySelectorAll('a[href]')].map(o => o.getAttribute('href'))")
        return Seen(page, log, [o.url for o in requests], size, ids, links)
    return visit


@each_page
def test_the_browser_has_nothing_to_complain_about(seen, name): assert seen(name).log == []


@each_page
def test_everything_comes_from_here(seen, site, name):
    assert [o for o in seen(name).requests if not o.startswith((site, 'data:'))] == []


@each_page
def test_a_page_is_light(seen, name):
    assert 20_000 < seen(name).size < budget.get(name, 2_000_000)


@each_chapter
def test_formulas_are_set(seen, name):
    page, source = seen(name).page, nbformat.read(notebooks[name], 4)
    text = '\n'.join(o.source for o in source.cells if o.cell_type == 'markdown')
    text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
    assert page.locator('.math.notranslate').count() >= text.count('$$') // 2 + ('$' in text)
    assert page.locator('.math.notranslate:not(:has(.MathJax))').count() == 0
    assert page.locator('.merror, .noError, .MathJax_Error, .MathJax [style*="color: red"]').count() == 0
    assert re.findall(r'\$|\\[a-zA-Z]+|\\[\[\](){}]', page.evaluate(prose)) == []


@each_page
def test_every_link_leads_somewhere(seen, site, name):
    for href in seen(name).links:
        url, anchor = urldefrag(urljoin(f'{site}{name}.html', href))
        if not url.startswith(site): continue
        path = unquote(urlsplit(url).path).lstrip('/') or 'index.html'
        assert (docs/path).is_file(), href
        if anchor: assert unquote(anchor) in seen(path.removesuffix('.html')).ids, href


@each_page
def test_the_menu_is_the_same_on_every_page(seen, site, name):
    "Pages keep their menu when another page is added, unless all are written again"
    def menu(n): return seen(n).page.evaluate("() => [...document.querySelectorAll('.sidebar-tree a')].map(o => o.pathname + o.innerText)")
    def plain(links): return [re.sub(r'.*/', '', o) for o in links]
    assert len(menu('index')) > 20 and plain(menu(name)) == plain(menu('index'))


@each_chapter
def test_the_sources_are_linked(seen, name):
    path = notebooks[name].relative_to(root).as_posix()
    links = [o for o in seen(name).links if o.endswith(path)]
    assert [urlsplit(o).netloc for o in links] == ['github.com', 'colab.research.google.com']


@each_page
def test_pictures_load_and_have_words(seen, name):
    bad = "() => [...document.images].filter(o => !o.naturalWidth || !o.alt.trim()).map(o => o.outerHTML.slice(0, 200))"
    assert seen(name).page.evaluate(bad) == []


@each_page
def test_a_phone_does_not_scroll_sideways(seen, name):
    page = seen(name).page
    page.set_viewport_size({'width': 390, 'height': 844})
    assert page.evaluate('() => document.documentElement.scrollWidth') <= 390
    assert page.evaluate(too_wide) == []
    page.set_viewport_size({'width': 1280, 'height': 900})


@each_page
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_stands_out_from_the_paper(seen, name, scheme):
    page = seen(name).page
    page.emulate_media(color_scheme=scheme)
    page.evaluate("() => document.querySelectorAll('details').forEach(o => o.open = true)")
    ratio, text = page.evaluate(contrast)
    assert ratio >= 4.5, f'{ratio:.2f} {text}'


def test_the_switch_changes_the_paper(browser, site):
    page = browser.new_page(color_scheme='light')
    page.goto(site)
    papers = []
    for _ in range(3):
        papers.append(page.evaluate('() => getComputedStyle(document.body).backgroundColor'))
        page.locator('.theme-toggle:visible').first.click()
    assert papers[0] == papers[2] != papers[1]


def test_search_finds_perturbed(browser, site):
    page = browser.new_page()
    page.goto(site)
    page.locator('.sidebar-search').fill('perturbed')
    page.locator('.sidebar-search').press('Enter')
    page.locator('ul.search li a').first.click()
    page.wait_for_selector('article h1')
    assert 'search' not in urlsplit(page.url).path and 'perturbed' in page.locator('article').inner_text()


def test_the_rho_slider_moves_the_picture(seen):
    page = seen('landscape').page
    slider = page.locator('input[type=range]').first
    assert slider.count() == 1, 'no slider on the page: was the notebook saved without its outputs?'
    shown = lambda: slider.evaluate("""o => [...o.closest('.cell_output, article').querySelectorAll('img')]
        .filter(o => o.checkVisibility()).map(o => o.currentSrc)""")
    before = shown()
    slider.press('End')
    assert len(before) >= 1 and shown() != before
    slider.press('Home')
    assert shown() != before or slider.input_value() == slider.get_attribute('min')


def test_the_reference_page_lists_every_public_name(site):
    from sam_explained import all as everything
    text = (docs/'all.html').read_text(encoding='utf-8')
    missing = [n for n in everything.__all__ if f'<span class="pre">{n}</span>' not in text]
    assert everything.__all__ and not missing, f'run 30_all.ipynb and save it: {missing}'
