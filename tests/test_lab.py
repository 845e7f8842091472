"""The notebook itself, live: JupyterLab in a real browser runs 00_landscape, the slider moves, the picture changes."""
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import nbformat
import pytest
from playwright.sync_api import sync_playwright

root = Path(__file__).parent.parent
notebook = '00_landscape.ipynb'
patience = 240          # seconds for one step on a slow, busy machine; nothing waits this long when all is well
quiet = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--no-first-run']


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab on a copy of the notebook, with settings, kernels and cache of its own."
    work = tmp_path/'nbs'
    work.mkdir()
    copy = nbformat.read(root/'nbs'/notebook, 4)
    for cell in copy.cells:
        if cell.cell_type == 'code': cell.outputs = []      # whatever is seen later was made by this run
    nbformat.write(copy, work/notebook)
    if (root/'nbs/images').exists(): shutil.copytree(root/'nbs/images', work/'images')
    own = {f'JUPYTER_{o}': str(tmp_path/o.lower()) for o in ('CONFIG_DIR', 'DATA_DIR', 'RUNTIME_DIR')}
    own |= {'IPYTHONDIR': str(tmp_path/'ipython'), 'MPLCONFIGDIR': str(tmp_path/'mpl'), 'PYTHONPATH': str(root)}
    port, log = free_port(), tmp_path/'lab.log'
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--ServerApp.password=',
               f'--ServerApp.root_dir={work}', '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=',
               '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']
    with log.open('w') as out:
        server = subprocess.Popen(command, env=os.environ | own, cwd=work, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(f'http://127.0.0.1:{port}/api/status', server, log)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()                                  # the server ends its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        server.wait()


def wait_for(url, server, log):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        assert server.poll() is None, f'JupyterLab ended:\n{log.read_text()[-3000:]}'
        try: return urlopen(url, timeout=5).read()
        except OSError: time.sleep(.3)
    raise AssertionError(f'JupyterLab did not answer:\n{log.read_text()[-3000:]}')


@pytest.fixture
def page():
    "A page in Debian's chromium that can reach this machine only; `page.refused` lists what else was asked for."
    chromium = shutil.which('chromium')
    assert chromium, 'chromium is not installed: apt-get install chromium'
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=quiet)
        try:
            page = browser.new_page(viewport=dict(width=1300, height=1000))
            page.set_default_timeout(patience * 1000)
            page.refused = []
            def gate(route):
                if urlsplit(route.request.url).hostname == '127.0.0.1': return route.continue_()
                page.refused.append(route.request.url)
                route.abort()
            page.route('**/*', gate)
            yield page
        finally: browser.close()


# What the page is asked. The notebook draws only the cells in view, so the kernel's answers are read from the model.
state = """() => {
    const model = window.jupyterapp?.shell.currentWidget?.content?.model
    if (!model) return null
    const code = [...model.cells].map(o => o.toJSON()).filter(o => o.cell_type == 'code' && o.source.length)
    return {cells: code.length, run: code.filter(o => o.execution_count).length,
            errors: code.flatMap(o => o.outputs).filter(o => o.output_type == 'error').map(o => o.ename + o.evalue)}
}"""
kernel = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status"


def wait(page, question, good, what):
    "Ask the page until the answer is good; say what was waited for, and the last answer, when it never is."
    end, answer = time.monotonic() + patience, None
    while time.monotonic() < end:
        answer = page.evaluate(question)
        if good(answer): return answer
        page.wait_for_timeout(250)
    raise AssertionError(f'{what}: {answer}')


def run_all(page, url):
    "Open the notebook, restart its kernel and run every cell; returns the errors that appeared."
    page.goto(f'{url}/lab/tree/{notebook}?reset')
    wait(page, kernel, lambda o: o == 'idle', 'the kernel never got ready')
    before = wait(page, state, lambda o: o and o['cells'], 'the notebook never opened')
    assert before['run'] == 0
    page.evaluate("() => { window.ran = window.jupyterapp.commands.execute('notebook:restart-run-all') }")
    page.get_by_role('button', name='Confirm Kernel Restart').click()
    done = wait(page, state, lambda o: o['run'] == o['cells'] or o['errors'], 'not every cell was run')
    return done['errors']


def test_the_live_slider_moves_the_picture(lab, page):
    assert run_all(page, lab) == []
    at = page.evaluate("""() => [...window.jupyterapp.shell.currentWidget.content.model.cells].findIndex(
        o => o.type == 'code' && [...Array(o.outputs.length).keys()].some(i => {
            const data = o.outputs.get(i).toJSON().data ?? {}
            return 'application/vnd.jupyter.widget-view+json' in data && 'text/html' in data }))""")
    assert at >= 0, 'no cell shows Frames with a live view'
    page.evaluate("at => window.jupyterapp.shell.currentWidget.content.scrollToItem(at, 'start')", at)
    live = page.locator('.jp-OutputArea-output .widget-vbox').filter(has=page.locator('.widget-play')).first
    live.wait_for()
    picture, handle = live.locator('img'), live.locator('.noUi-handle')
    picture.scroll_into_view_if_needed()
    shown = lambda: (picture.get_attribute('src'), picture.get_attribute('alt'))
    src, alt = shown()
    assert src.startswith('data:image/webp;base64,') and alt.endswith('rho = 0.00')
    assert picture.evaluate('o => o.complete && o.naturalWidth > 300'), 'the first picture is not drawn'
    seen = {src}
    for label in ('0.02', '0.04'):
        handle.press('ArrowRight')
        end = time.monotonic() + patience / 8
        while shown()[0] in seen and time.monotonic() < end: page.wait_for_timeout(100)
        src, alt = shown()
        assert src not in seen, f'the slider moved to {label} and the picture did not change'
        assert alt.endswith(f'rho = {label}')
        assert picture.evaluate('o => o.complete && o.naturalWidth > 300')
        seen.add(src)
    assert live.locator('.widget-readout').inner_text() == '0.04'
    assert page.refused == [], 'JupyterLab asked another host'
