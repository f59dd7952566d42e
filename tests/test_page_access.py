"""The page for those who don't see it: axe-core's rules at both sizes and in both colours, roles, focus, what is read out.

axe-core is no part of this package: `npm install --prefix FOLDER axe-core`, and RLHF_RAY_AXE names its axe.min.js in node_modules.
"""

import os
from pathlib import Path

import pytest
from browsers import SIZES, Tab, chromium, context_of  # noqa: F401 - chromium is a fixture
from paged import PROMPTS, SCRIPT, paged

AXE = os.environ.get("RLHF_RAY_AXE")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SHOTS = os.environ.get("RLHF_RAY_SCREENSHOTS")  # a folder


@pytest.fixture
def served(chromium, tmp_path):  # noqa: F811
    with paged(tmp_path, votes_per_minute=600, votes_per_comparison=1) as one:
        yield one


@pytest.fixture
def tab(chromium, served):  # noqa: F811
    contexts = []

    def open_(size, **settings):
        context = context_of(chromium, size, **settings)
        contexts.append(context)
        context.add_init_script("localStorage.rater ??= 'ann'")
        return Tab(context, served.url)

    yield open_
    for context in contexts:
        context.close()


def ask_chat(page):
    page.fill("#chat-text", PROMPTS[0])
    page.click("#chat-send")
    page.wait_for_selector("#chat-send:has-text('Send')")
    page.wait_for_selector(".turn.assistant:not(.busy)")


def draw(page):
    page.fill("#playground-form textarea", PROMPTS[0])
    page.click("#playground-form button")
    page.wait_for_selector(".tokens span")
    page.focus(".tokens >> nth=0")
    page.keyboard.press("ArrowRight")


def vote(page):
    page.wait_for_selector("#compare-card:visible")
    page.click("#compare-more summary")
    page.click("[data-choice=left]")
    page.wait_for_selector("#last-text:has-text('Your vote')")
    page.wait_for_selector("#compare-card:visible")
    page.click("#compare-more summary")
    page.click("#own summary")


def read_results(page):
    page.wait_for_selector(".vote")
    page.click(".vote summary >> nth=0")


FILLED = {"compare": vote, "results": read_results, "chat": ask_chat, "playground": draw}


def broken(page):
    """What axe-core finds, as 'rule: element'."""
    page.evaluate(Path(AXE).read_text())
    found = page.evaluate("(tags) => axe.run(document, {runOnly: tags})", RULES)
    return [
        f"{rule['id']}: {node['html'][:120]} {node['failureSummary'].splitlines()[-1].strip()}"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]


@pytest.mark.skipif(AXE is None, reason="needs axe-core from npm, named by RLHF_RAY_AXE")
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_in_any_view(served, tab, size, colours):
    opened = tab(size, color_scheme=colours, reduced_motion="reduce")
    for view, act in FILLED.items():
        page = opened.open(f"#{view}")
        act(page)
        page.wait_for_timeout(100)
        if SHOTS:
            page.screenshot(path=str(Path(SHOTS) / f"access-{view}-{size}-{colours}.png"), full_page=True)
        assert broken(page) == [], view
    page.click("#who")
    assert broken(page) == [], "the dialog"


def test_every_control_has_a_role_and_a_name_in_the_accessibility_tree(served, tab):
    """As Chromium hands it to a screen reader."""
    page = tab("desk").open("#compare")
    page.wait_for_selector("#compare-card:visible")
    tree = page.locator("body").aria_snapshot()
    for line in (
        'navigation "Views"', 'link "Compare"', 'button "ann"', 'button "Dark colours"', 'article "Answer 1"', 'article "Answer 2"',
        'heading "Which answer is better?" [level=1]', 'group "Your vote"', 'button "1 is better"', 'button "Tie"',
        'button "Both bad"', 'button "2 is better"', 'checkbox "Vote by keys',
    ):  # fmt: skip
        assert line in tree, tree
    # A new comparison is where the reader is put, so that it is read next.
    assert page.evaluate("document.activeElement.id") == "compare-prompt-title"
    page.click("nav a[href='#playground']")
    tree = page.locator("main").aria_snapshot()
    for line in ('textbox "Prompt"', 'combobox "Model"', 'combobox "Beside"', 'combobox "Reference"', 'spinbutton "Temperature"',
                 'spinbutton "Tokens"', 'spinbutton "Seed"', 'button "Draw"', 'group "Colour"', 'radio "log-prob"'):  # fmt: skip
        assert line in tree, tree


def test_tab_walks_from_the_skip_link_through_head_and_view_in_the_order_that_is_seen(served, tab):
    page = tab("desk").open("#chat")
    page.wait_for_selector("#chat-model option", state="attached")
    walked = []
    for _ in range(11):
        page.keyboard.press("Tab")
        walked.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert walked == ["To the content", "Chat", "Compare", "Results", "Playground", "who", "theme", "chat-model", "chat-new",
                      "chat-text", "chat-send"]  # fmt: skip


def test_a_streamed_answer_is_read_out_by_whole_sentences_each_once(chromium, tmp_path):  # noqa: F811
    with paged(tmp_path, names=("ppo",), step_s=0.02) as served:
        page = Tab(context_of(chromium, "desk"), served.url).open("#chat")
        page.wait_for_selector("#chat-model option", state="attached")
        page.evaluate("""() => {
            window.heard = [];
            new MutationObserver((changes) => changes.forEach((each) =>
                each.addedNodes.forEach((node) => heard.push(node.textContent)))).observe(document.getElementById("chat-heard"),
                {childList: true, subtree: true, characterData: true});
        }""")
        ask_chat(page)
        heard = page.evaluate("heard")
        assert page.get_attribute("#chat-log", "aria-live") == "off"  # or each token would be read out
        assert page.get_attribute("#chat-heard", "aria-live") == "polite"
    text = SCRIPT["ppo"]["roses"]
    assert " ".join(heard).split() == text.split() and len(heard) >= 3
    assert all(each[-1] in ".!?" for each in heard[:-1])
