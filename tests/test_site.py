"The built site as a reader's browser sees it: real Chromium, a local server, and no other host to be reached."
import functools, hashlib, http.server, re, shutil, subprocess, sys, threading
from collections import namedtuple
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import nbformat, pytest
from axe_playwright_python.base import AXE_SCRIPT
from PIL import Image

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'site'))
import build
from book import docs, heading, host, nbs, page as page_name, present, sections, settings

notebooks = {page_name(o): nbs/o for _, names in sections() for o in names}
each_page = pytest.mark.parametrize('name', [*notebooks, 'search', '404'])
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


class Host(http.server.SimpleHTTPRequestHandler):
    "The book at the address it is published at; what is not there gets 404.html, as on GitHub's pages."
    base = settings['doc_baseurl'] + '/'
    def log_message(self, *args): pass
    def translate_path(self, path): return super().translate_path(path.removeprefix(self.base[:-1]))
    def send_head(self):
        known = self.path.startswith(self.base) and Path(self.translate_path(self.path)).exists()
        if known: return super().send_head()
        self.send_response(404)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        return open(docs/'404.html', 'rb')


@pytest.fixture(scope='module')
def site():
    "The address of a local server over a fresh `_docs/`; a site that is fresh already takes a few seconds."
    subprocess.run([sys.executable, root/'site/build.py', '--no-quarto'], check=True)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Host, directory=docs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}{Host.base}'
    server.shutdown()


# Code and formulas as one text each: axe looks at every element, and what stands in them is tested above.
flat = """() => { document.querySelectorAll('details').forEach(o => o.open = true)
                  document.querySelectorAll('pre').forEach(o => o.textContent = o.textContent)
                  document.querySelectorAll('.MathJax > nobr').forEach(o => o.remove()) }"""

# How far the text moved while the page came, as browsers count it (cumulative layout shift).
shifts = """() => { window.shift = 0; new PerformanceObserver(all => { for (const o of all.getEntries())
    if (!o.hadRecentInput) window.shift += o.value }).observe({type: 'layout-shift', buffered: true}) }"""


@pytest.fixture(scope='module')
def browser():
    chromium = shutil.which('chromium')
    if not chromium: pytest.fail("The site is tested in Debian's browser, which is not here: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=offline)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
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
        path = unquote(url.removeprefix(site)) or 'index.html'
        assert (docs/path).is_file(), href
        if anchor and path.endswith('.html'): assert unquote(anchor) in seen(path.removesuffix('.html')).ids, href


@each_page
def test_the_menu_is_the_same_on_every_page(seen, site, name):
    "Pages keep their menu when another page is added, unless all are written again"
    def menu(n): return seen(n).page.evaluate("() => [...document.querySelectorAll('.sidebar-tree a')].map(o => o.pathname + o.innerText)")
    def plain(links): return [re.sub(r'.*/', '', o) for o in links]
    assert len(menu('index')) > 20 and plain(menu(name)) == plain(menu('index'))


@each_chapter
def test_the_notebook_is_at_hand(seen, name):
    "Colab, a download of the very file, GitHub, and its editor"
    path, links = notebooks[name].relative_to(root).as_posix(), [urlsplit(o) for o in seen(name).links]
    colab, download, github, edit = [o for o in links if o.path.endswith(notebooks[name].name)]
    where, branch = f"/{settings['user']}/{settings['repo']}", settings['branch']
    assert (colab.netloc, colab.path) == ('colab.research.google.com', f'/github{where}/blob/{branch}/{path}')
    assert (github.netloc, github.path) == ('github.com', f'{where}/blob/{branch}/{path}')
    assert (edit.netloc, edit.path) == ('github.com', f'{where}/edit/{branch}/{path}')
    assert not download.netloc and (docs/download.path).read_bytes() == notebooks[name].read_bytes()


@each_chapter
def test_previous_and_next_follow_the_book(seen, name):
    order = [page_name(o) for o in present()]
    i = order.index(name)
    there = seen(name).page.evaluate("""() => ['prev', 'next'].map(o => [...document.querySelectorAll(`a.${o}-page, link[rel=${o}]`)]
        .map(o => new URL(o.href).pathname.split('/').pop().replace('.html', '')))""")
    assert there == [order[i - 1:i] * 2 if i else [], order[i + 1:i + 2] * 2]


@each_chapter
def test_a_page_says_what_it_is(seen, browser, site, name):
    "Its one sentence, its one address and its picture, for search engines and for those who pass a link on"
    tags = dict(seen(name).page.evaluate("""() => [...document.querySelectorAll('meta[content]')].map(
        o => [o.getAttribute('name') ?? o.getAttribute('property'), o.content])"""))
    canonical = seen(name).page.locator('link[rel=canonical]').evaluate_all('all => all.map(o => o.href)')
    title, sentence = heading(notebooks[name].name)
    assert len(sentence) > 40 and not re.search(r'[`$*\[\]<>]', title + sentence)
    assert [tags['description'], tags['og:description'], tags['twitter:description']] == [sentence] * 3
    assert tags['og:title'] == tags['twitter:title'] == title and tags['twitter:card'] == 'summary_large_image'
    assert canonical == [tags['og:url']] == [host + ('' if name == 'index' else f'{name}.html')]
    assert tags['og:image'] == tags['twitter:image'] and tags['og:image'].startswith(host)
    picture = docs/tags['og:image'].removeprefix(host)
    assert picture.stat().st_size < 100_000
    with Image.open(picture) as o: assert o.size == (1200, 630) == (int(tags['og:image:width']), int(tags['og:image:height']))


def test_the_book_has_a_mark(seen, site):
    icon = seen('core').page.locator('link[rel~=icon]').evaluate('o => o.href')
    assert (docs/icon.removeprefix(site)).read_bytes() == (nbs/'favicon.svg').read_bytes()


def test_code_is_copied_as_it_stands(browser, site):
    context = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    page.goto(f'{site}core.html')
    button = page.locator('div.cell_input .copybtn').first
    button.focus()
    page.keyboard.press('Enter')
    page.wait_for_selector('.copybtn.success')
    shown = page.locator('div.cell_input pre').first.text_content()
    assert page.evaluate('() => navigator.clipboard.readText()').strip() == shown.strip() != ''
    assert page.locator('.cell_output .copybtn').count() == 0
    assert page.locator('.copybtn').count() == page.locator('article .highlight:not(.cell_output *) > pre').count() > 20
    context.close()


@pytest.mark.parametrize('address', ['nothing.html', 'far/away/nothing', '_static/nothing.html?q=1#there'])
def test_an_unknown_address_gets_help(browser, site, address):
    "In the book's own dress, at any depth, with a way on"
    page, failed = browser.new_page(), []
    page.on('response', lambda o: failed.append(o.url) if o.status >= 400 else None)
    page.goto(site + address)
    assert failed == [(site + address).partition('#')[0]]
    assert page.evaluate("() => getComputedStyle(document.querySelector('.content')).width") == '800px'
    links = page.locator('article li a').evaluate_all('all => all.map(o => o.href)')
    assert [o.removeprefix(site) for o in links] == [f'{page_name(o)}.html' for o in present()]
    page.locator('article input[name=q]').fill('grad_norm')
    page.locator('article input[name=q]').press('Enter')
    page.wait_for_selector('ul.search li')
    assert urlsplit(page.url).path == Host.base + 'search.html'
    page.close()


def test_old_links_lead_on(browser, site, tmp_path):
    table = tmp_path/'moved.txt'
    table.write_text('# a comment\n\nlookahead -> core#perturbed\nplain -> core\n')
    moved = build.moved(table)
    assert moved == {'lookahead': 'core.html#perturbed', 'plain': 'core.html'}
    page = browser.new_page()
    page.route('**/lookahead.html', lambda o: o.fulfill(body=build.redirect(moved['lookahead']), content_type='text/html'))
    page.goto(f'{site}lookahead.html')
    page.wait_for_url(f'{site}core.html#perturbed')
    page.close()
    assert f'<link rel="canonical" href="{host}core.html#perturbed">' in build.redirect(moved['lookahead'])
    pages = {*notebooks}
    for table in ({'core': 'sam.html'}, {'old': 'nowhere.html'}, {'old': 'core.html#nowhere'}):
        with pytest.raises(SystemExit, match='moved.txt'): build.redirects(pages, table)
    for old, new in build.moved().items(): assert (docs/f'{old}.html').read_text() == build.redirect(new)


@each_page
def test_pictures_load_and_have_words(seen, name):
    bad = "() => [...document.images].filter(o => !o.naturalWidth || !o.alt.trim()).map(o => o.outerHTML.slice(0, 200))"
    assert seen(name).page.evaluate(bad) == []


@each_page
def test_pictures_keep_their_room(seen, name):
    bad = """() => [...document.images].filter(o => { const ratio = o.getAttribute('width') / o.getAttribute('height')
        return !(Math.abs(ratio * o.naturalHeight / o.naturalWidth - 1) < .02) }).map(o => o.outerHTML.slice(0, 200))"""
    assert seen(name).page.evaluate(bad) == []


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('name', ['masks', 'core', 'planes'])
def test_nothing_moves_while_a_page_comes(browser, site, name, width):
    "Pages with many pictures and with formulas above the fold, over a slow line"
    context = browser.new_context(viewport={'width': width, 'height': 900})
    page = context.new_page()
    line = context.new_cdp_session(page)
    line.send('Network.enable')
    line.send('Network.emulateNetworkConditions',
              {'offline': False, 'latency': 60, 'downloadThroughput': 400_000, 'uploadThroughput': 400_000})
    page.add_init_script(f'({shifts})()')
    page.goto(f'{site}{name}.html', timeout=120_000)
    page.evaluate(formulas_done)
    page.wait_for_load_state('networkidle')
    assert page.evaluate('() => window.shift') < .02
    context.close()


@each_page
def test_little_stands_before_the_first_line(seen, site, name):
    "What the browser must fetch before one can read and click: a page is ready at once from a near server"
    blocking = seen(name).page.evaluate("""() => [...document.querySelectorAll('link[rel=stylesheet], script[src]')]
        .filter(o => !o.async && !o.defer).map(o => o.href ?? o.src)""")
    files = [docs/urlsplit(o).path.removeprefix(Host.base) for o in blocking if 'searchindex' not in o]
    ready = seen(name).page.evaluate("() => performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    size = sum(o.stat().st_size for o in files)
    print(f'{name}: ready after {ready:.0f} ms, {len(files)} files, {size // 1000} KB')
    assert len(files) <= (17 if name == 'search' else 14) and size < 300_000


@each_page
def test_anchors_are_unique(seen, name):
    ids = seen(name).page.evaluate("() => [...document.querySelectorAll('[id]:not(.MathJax *, svg *, .math *)')].map(o => o.id)")
    assert len(ids) == len({*ids}), [o for o in {*ids} if ids.count(o) > 1]


def axe(browser, site, name, scheme, **options):
    "What the rules of axe-core find on a page with all folds open"
    page = browser.new_page(viewport={'width': 1280, 'height': 900}, color_scheme=scheme)
    page.goto(f'{site}{name}.html')
    page.evaluate(formulas_done)
    page.evaluate(flat)
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate('o => axe.run(document, o)', {'resultTypes': ['violations'], **options})['violations']
    print(*(f"{name}: {o['impact']} {o['id']} {o['nodes'][0]['html'][:120]}" for o in found), sep='\n')
    page.close()
    return [(o['id'], o['nodes'][0]['html'][:200]) for o in found if o['impact'] in ('serious', 'critical')]


@each_page
def test_axe_finds_nothing_serious(browser, site, name):
    "All rules but contrast, which takes them most of the time and which another test measures on each page"
    assert axe(browser, site, name, 'light', rules={'color-contrast': {'enabled': False}}) == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['index', 'core', 'prices', 'claims_sam', '404'])
def test_axe_finds_the_contrast_enough(browser, site, name, scheme):
    assert axe(browser, site, name, scheme, runOnly=['color-contrast']) == []


def test_the_keyboard_leads_everywhere(browser, site):
    "Past the menu, with a ring to see where one is; to boxes that scroll; and through the menus of a narrow screen"
    page = browser.new_page(viewport={'width': 1280, 'height': 900})
    page.goto(f'{site}masks.html')
    page.keyboard.press('Tab')
    assert 'skip-to-content' in page.evaluate('() => document.activeElement.className')
    assert page.evaluate('() => getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    page.wait_for_function('() => document.activeElement.getBoundingClientRect().top >= 0')
    page.keyboard.press('Enter')
    assert page.url.endswith('#furo-main-content')
    page.keyboard.press('Tab')
    assert page.evaluate("() => document.activeElement.closest('article') != null")
    page.set_viewport_size({'width': 390, 'height': 844})
    page.evaluate(formulas_done)
    unreached = """() => [...document.querySelectorAll('article pre, .table-wrapper, div.math')].filter(o => o.checkVisibility()
        && o.scrollWidth > o.clientWidth + 1 && o.tabIndex != 0).map(o => o.outerHTML.slice(0, 100))"""
    page.wait_for_function(f'() => ({unreached})().length == 0', timeout=10_000)
    page.locator('label.nav-overlay-icon').focus()
    page.keyboard.press('Enter')
    page.wait_for_function("() => document.querySelector('.sidebar-drawer').getBoundingClientRect().left == 0")
    page.close()


def test_paper_is_white_and_bare(browser, site):
    "A reader in dark mode prints: light colours, no menus, no buttons, nothing cut, solutions to read"
    page = browser.new_page(viewport={'width': 1280, 'height': 900}, color_scheme='dark')
    page.goto(f'{site}rate.html')
    page.evaluate(formulas_done)
    page.evaluate("() => document.body.dataset.theme = 'dark'")
    page.emulate_media(media='print')
    hidden = '.sidebar-drawer, .toc-drawer, .mobile-header, .copybtn, .theme-toggle, .page-links, .related-pages, .find'
    assert page.evaluate(f"() => [...document.querySelectorAll('{hidden}')].filter(o => o.checkVisibility()).length") == 0
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == 'rgb(255, 255, 255)'
    ratio, text = page.evaluate(contrast)
    assert ratio >= 4.5, f'{ratio:.2f} {text}'
    assert page.locator('details:not(.exported) > p').first.is_visible()
    wide = """() => [...document.querySelectorAll('article pre, article img, .table-wrapper')].filter(o =>
        o.checkVisibility() && o.getBoundingClientRect().width > 0 && o.scrollWidth > o.clientWidth + 1).length"""
    page.set_viewport_size({'width': 680, 'height': 960})
    assert page.evaluate(wide) == 0
    assert page.pdf().startswith(b'%PDF')
    page.close()


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


@pytest.mark.parametrize('asked, wanted', [
    ('ball_sharpness', 'sharpness.html#ball_sharpness'), ('sam', 'sam.html#sam'), ('SSAM', 'ssam.html#ssam'),
    ('perturbed', 'core.html#perturbed'), ('hvp', 'objective.html#objective.hvp'), ('m-sharpness', 'sharpness.html#m_sharpness'),
    ('eps', 'core.html'), ('two_pass', 'core.html#two_pass'), ('n_shards', 'msam.html#msam')])
def test_search_finds_names(browser, site, asked, wanted):
    "The page that explains a symbol or a name is among the first three"
    page, log = browser.new_page(), []
    page.on('pageerror', lambda o: log.append(str(o)))
    page.goto(site)
    page.locator('.sidebar-search').fill(asked)
    page.locator('.sidebar-search').press('Enter')
    page.wait_for_function("() => document.querySelector('.search-summary')?.innerText.includes('finished')")
    found = page.locator('ul.search > li > a').evaluate_all('all => all.slice(0, 3).map(o => o.href)')
    assert any(o.removeprefix(site).startswith(wanted) for o in found), found
    page.locator('ul.search > li > a').first.click()
    page.wait_for_selector('article h1')
    assert 'search' not in urlsplit(page.url).path and log == []
    page.close()


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


def test_long_sources_are_folded():
    short, long = 'def f(x): return x', 'def f(x):\n' + '\n\n'.join(f'    x += {i}' for i in range(12))
    assert ' open' in build.fold('Source', short) and ' open' in build.fold('Source', long.replace('    x += 11', ''))
    assert ' open' not in build.fold('Source', long) and ' open' not in build.fold('Source', 'class A:\n    pass')


@each_chapter
def test_sources_are_open_when_short(seen, name):
    folds = seen(name).page.context.browser.new_page()
    folds.set_content((docs/f'{name}.html').read_text(encoding='utf-8').partition('<article')[2].partition('<footer')[0])
    all_folds = folds.locator('details.exported').evaluate_all('all => all.map(o => [o.open, o.querySelector("pre").textContent])')
    for opened, text in all_folds:
        lines = [o for o in text.splitlines() if o.strip()]
        assert opened == (len(lines) <= 12 and not re.search('^class ', text, re.M)), text[:80]
    folds.close()


def test_a_subclass_explains_only_what_it_adds(seen):
    page = seen('msam').page
    entry = page.locator('section#msam > .api').first
    shown = page.locator('section#msam > .table-wrapper td:first-child, section#msam .api td:first-child').all_inner_texts()
    assert entry.count() and shown == ['n_shards', 'rho', 'shard_size', 'vmap']
    theirs = page.locator('section#msam .api p', has_text='The arguments').first
    assert 'adaptive' in theirs.inner_text() and theirs.locator('a').get_attribute('href') == 'sam.html#sam'


def test_built_twice_is_built_once(site):
    "Building again changes no file: a page depends on the book alone"
    def state(): return {o: hashlib.sha256(o.read_bytes()).hexdigest() for o in docs.rglob('*') if o.is_file()}
    before = state()
    (root/'build/made_by').unlink()                   # and now everything from the start
    subprocess.run([sys.executable, root/'site/build.py', '--no-quarto'], check=True)
    after = state()
    assert after.keys() == before.keys() and [o.name for o in after if after[o] != before[o]] == []
