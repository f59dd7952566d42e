"""A real headless Chromium for tests: Debian's `chromium` or `chromium-headless-shell`, driven by playwright (extra `browser`)."""

import os
import shutil

import pytest

PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")
SIZES = {"phone": (390, 844), "desk": (1280, 800)}


def program():
    return os.environ.get("RLHF_RAY_BROWSER") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@pytest.fixture(scope="session")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'rlhf-ray[browser]'")
    if program() is None:
        pytest.skip("needs a browser: apt-get install chromium, or name one by RLHF_RAY_BROWSER")
    with sync.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program(), args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


class Tab:
    """A page of a browser that keeps what it asked for, and what went wrong in it."""

    def __init__(self, context, url):
        self.page = context.new_page()
        self.page.set_default_timeout(30_000)
        self.asked, self.faults, self.told = [], [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("response", self._note)
        self.url = url

    def _note(self, response):
        if response.url.endswith("/page/comparisons"):
            self.told.append(response)

    def open(self, view=""):
        self.page.goto(f"{self.url}/{view}")
        return self.page


def context_of(browser, size, **settings):
    width, height = SIZES[size]
    phone = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
    return browser.new_context(viewport={"width": width, "height": height}, **phone, **settings)
