"""The page at ``/vico`` in Chromium: a picture is dropped, thresholds move, a question is asked, counters count."""

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from system.programs import program
from waiting import HANG

from lmdeploy_vico.launch import ApiServer
from lmdeploy_vico.reader.demo import documents
from lmdeploy_vico.reader.shipped import write_reader

pytestmark = [pytest.mark.system, pytest.mark.server]

KEY = 'secret'
PACKAGES = 'chromium chromium-driver'
NAME = 'list, photographs'  # of the demonstration's documents: three tiles and a thumbnail, of which one is print


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp('server')
    write_reader(folder / 'reader')
    arguments = '--api-keys', KEY, '--max-batch-size', '8', '--num-gpu-blocks', '512'
    environment = {'LMDEPLOY_VICO_PAGE': '1'}
    with ApiServer(folder / 'reader', *arguments, log=folder / 'log', environment=environment) as running:
        yield running


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    from PIL import Image

    [document] = [one for one in documents() if one.name == NAME]
    path = tmp_path_factory.mktemp('picture') / 'document.png'
    Image.fromarray(document.pixels).save(path)
    return path, document


@pytest.fixture(scope='module')
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = program('chromium', PACKAGES)
    for argument in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,1500'):
        options.add_argument(argument)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program('chromedriver', PACKAGES)))
    yield driver
    driver.quit()


class Page:
    """The page, by what a person does to it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(f'{url}/vico')

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def until(self, condition):
        return WebDriverWait(self.browser, HANG).until(lambda _: condition())

    def slide(self, name, value):
        script = 'arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event("input", {bubbles: true}))'
        self.browser.execute_script(script, self[name], value)

    def rows(self, name):
        return [
            [cell.text for cell in row.find_elements(By.CSS_SELECTOR, 'td, th')]
            for row in self[name].find_elements(By.CSS_SELECTOR, 'tbody tr')
        ]

    def counter(self, name):
        return dict(self.rows('counters')).get(name, '')


@pytest.fixture
def page(server, browser, picture):
    """With the key, and with the picture, routed."""
    path, _ = picture
    page = Page(browser, server.url)
    page['files'].send_keys(str(path))
    page.until(lambda: 'asks for an API key' in page['message'].text)
    page['key'].send_keys(KEY)
    page['files'].clear()
    page['files'].send_keys(str(path))
    page.until(lambda: page['tokens'].text)
    return page


def test_a_picture_and_thresholds(page):
    assert page['tokens'].text == '3 of 4 tiles at 64 tokens: 448 of 1024 visual tokens, 56 % saved.'
    [canvas] = page.browser.find_elements(By.CSS_SELECTOR, '#shown canvas')
    assert canvas.get_attribute('width') == str(4 * 168 + 12)
    described = canvas.get_attribute('aria-label')
    assert 'document.png: 3 by 1 tiles and a thumbnail; scores' in described and described.count('compressed') == 3
    page.slide('absolute', 1)
    assert page['tokens'].text.startswith('0 of 4 tiles')
    page.slide('absolute', 0)
    page.slide('relative', 0.5)
    assert page['tokens'].text.startswith('2 of 4 tiles')
    page['by-share'].click()
    page.slide('share', 1)
    assert page['tokens'].text.startswith('4 of 4 tiles')
    page['reset'].click()
    assert page['tokens'].text.startswith('3 of 4 tiles')
    assert page['message'].text == ''


def test_three_answers_and_counters(page, picture):
    _, document = picture
    before = page.until(lambda: page.counter('visual tokens saved'))
    page['question'].clear()
    page['question'].send_keys(document.question, Keys.ENTER)
    page.until(lambda: page['send'].is_enabled() and len(page.rows('answers')) == 3)
    answers = {row[0]: row for row in page.rows('answers')}
    assert list(answers) == ['none', 'auto', 'all'] and page['message'].text == ''
    tokens = {way: int(row[1]) for way, row in answers.items()}
    assert tokens['none'] - tokens['auto'] == 3 * 192 and tokens['none'] - tokens['all'] == 4 * 192
    assert answers['none'][3] == answers['auto'][3] == document.answer != answers['all'][3]
    assert all(row[2].endswith(' ms') for row in answers.values())
    page.until(lambda: page.counter('visual tokens saved') != before)
    assert 'none yet' not in page.counter('mean time to the first token')


def test_a_picture_that_is_none(page, tmp_path):
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    page['files'].send_keys(str(tmp_path / 'broken.png'))
    page.until(lambda: page['message'].text.startswith('The server answered 400: '))


def test_keyboard_and_names(page):
    """Everything can be reached by the keyboard, and says what it is."""
    reached = []
    page.browser.find_element(By.TAG_NAME, 'body').click()
    for _ in range(20):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        reached.append(page.browser.switch_to.active_element.get_attribute('id'))
    assert {'files', 'relative', 'absolute', 'by-share', 'reset', 'question', 'send'} <= set(reached)
    for one in page.browser.find_elements(By.CSS_SELECTOR, 'input, button, canvas'):
        assert one.accessible_name.strip(), one.get_attribute('outerHTML')
    assert page['message'].get_attribute('aria-live') == 'polite'


def test_nothing_is_refused_by_its_own_policy(page):
    """A violation of the policy, or an error of the script, would be in the log; requests that were refused are not."""
    log = [one for one in page.browser.get_log('browser') if one['level'] == 'SEVERE']
    assert [one for one in log if 'status of 401' not in one['message'] and 'status of 400' not in one['message']] == []
