"""The page in a real headless Chromium, at the sizes of a phone and a desk, by clicks, taps and keys."""

import os
import re
from pathlib import Path

import pytest
from browsers import SIZES, Tab, chromium, context_of  # noqa: F401 - chromium is a fixture
from paged import PROMPTS, SCRIPT, paged

from rlhf_ray.votes.export import edit_rows
from rlhf_ray.votes.invitations import invite
from rlhf_ray.votes.reading import read_judgements

VIEWS = ("chat", "compare", "results", "playground")
SHOTS = os.environ.get("RLHF_RAY_SCREENSHOTS")  # a folder


@pytest.fixture
def served(chromium, tmp_path):  # noqa: F811
    with paged(tmp_path, votes_per_minute=600, votes_per_comparison=1) as one:
        yield one


@pytest.fixture
def tab(chromium, served):  # noqa: F811
    """tab(size, name) -> a tab of a browser of its own, where somebody of this name votes."""
    contexts = []

    def open_(size="desk", name="ann", context=None, **settings):
        if context is None:
            context = context_of(chromium, size, **settings)
            contexts.append(context)
            if name:
                context.add_init_script(f"localStorage.rater ??= {name!r}")
        return Tab(context, served.url)

    yield open_
    for context in contexts:
        context.close()


def judged(served):
    return [each.vote for each in read_judgements(served.store.database)]


def ready(page):
    page.wait_for_selector("#compare-card:visible")
    return page


def saved(served, page, votes):
    """Wait until so many votes are stored and the next comparison is shown."""
    for _ in range(600):
        if len(judged(served)) >= votes:
            break
        page.wait_for_timeout(50)
    assert len(judged(served)) == votes
    page.wait_for_selector("#last-text:has-text('Your vote')")


def shoot(page, name):
    if SHOTS:
        page.wait_for_timeout(200)
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


# -- compare


@pytest.mark.parametrize("size", SIZES)
def test_a_person_says_who_they_are_and_votes_by_clicks_and_keys(served, tab, size):
    opened = tab(size, name="")
    page = opened.open()
    page.fill("#sign-name", "Ann")
    assert page.inner_text("#compare-status") == "", "nobody writes yet"
    page.click("#sign-form button.main")
    ready(page)
    shoot(page, f"compare-{size}")
    for votes, choice in enumerate(("left", "tie", "both_bad", "right"), 1):
        ready(page).click(f"[data-choice={choice}]")
        saved(served, page, votes)
    for votes, key in enumerate(("ArrowLeft", "ArrowRight", "1", "2", "3", "4"), 5):
        ready(page).keyboard.press(key)
        saved(served, page, votes)
    said = ["left", "tie", "both_bad", "right", "left", "right", "left", "right", "tie", "both_bad"]
    assert [vote.choice for vote in judged(served)] == said and {vote.rater for vote in judged(served)} == {"Ann"}
    assert len({vote.key for vote in judged(served)}) == 10 and all(0 < vote.seconds < 60 for vote in judged(served))
    for response in opened.told:
        assert not {"sft", "ppo"} & set(re.findall(r"\w+", response.text()))
    assert not opened.faults and all(url.startswith(served.url) for url in opened.asked)


def test_what_is_on_the_left_is_what_the_vote_says(served, tab):
    page = ready(tab().open())
    left = page.inner_text("#compare-left")
    page.keyboard.press("ArrowLeft")
    saved(served, page, 1)
    (judgement,) = read_judgements(served.store.database)
    assert judgement.comparison.answer(judgement.judged).text.strip() == left
    writer = judgement.comparison.answer(judgement.judged).model
    page.click("#last-who")
    assert f"Answer 1 is by {writer} " in page.inner_text("#last-text") and page.is_hidden("#last-change")


def test_the_two_versions_of_one_model_are_compared_and_told_apart(chromium, tmp_path):  # noqa: F811
    with paged(tmp_path, names=("ppo",), canary=("stable1", "canary2"), votes_per_minute=600) as served:
        context = context_of(chromium, "desk")
        context.add_init_script("localStorage.rater ??= 'ann'")
        opened = Tab(context, served.url)
        page = ready(opened.open())
        left_is_better = page.inner_text("#compare-left").startswith(tuple(text[:12] for text in SCRIPT["ppo"].values()))
        page.keyboard.press("ArrowLeft" if left_is_better else "ArrowRight")
        saved(served, page, 1)
        page.click("#last-who")
        one, other = ("canary2", "stable1") if left_is_better else ("stable1", "canary2")
        assert f"Answer 1 is by ppo (version {one}), answer 2 by ppo (version {other})." in page.inner_text("#last-text")
        page.click("nav a[href='#results']")
        page.wait_for_selector("td:has-text('ppo@canary2'), th:has-text('ppo@canary2')")
        shoot(page, "results-versions")
        page.click("nav a[href='#playground']")
        names = page.locator("#playground-form [name=two] option").all_inner_texts()
        assert names == ["none", "ppo", "ppo@stable1", "ppo@canary2"]
        context.close()
    assert not opened.faults


def test_a_vote_can_say_more_and_be_changed(served, tab):
    page = ready(tab().open())
    prompt = page.inner_text("#compare-prompt")
    page.click("#compare-more summary")
    page.check("input[name=rating][value='4']")
    page.fill("textarea[name=reason]", "It says 1 and ← too")  # keys that vote elsewhere
    page.press("textarea[name=reason]", "ArrowLeft")
    page.select_option("select[name=edit_of]", "right")
    assert page.input_value("textarea[name=edit]") == page.inner_text("#compare-right")
    page.fill("textarea[name=edit]", "As it should be.")
    assert judged(served) == []
    page.click("[data-choice=right]")
    saved(served, page, 1)
    (vote,) = judged(served)
    assert (vote.choice, vote.rating, vote.reason, vote.edit_of) == ("right", 4, "It says 1 and ← too", "right")
    (row,) = edit_rows(read_judgements(served.store.database), messages=True)
    assert (
        row["completion"] == [{"role": "assistant", "content": "As it should be."}]
        and row["prompt"][0]["content"] == prompt
    )
    ready(page).click("#last-change")
    page.wait_for_selector("#compare-more[open]")
    assert page.input_value("textarea[name=reason]") == vote.reason and page.inner_text("#compare-prompt") == prompt
    page.fill("input[name=flag]", "a mistake")
    page.click("[data-choice=tie]")
    page.wait_for_selector("#last-text:has-text('a tie')")
    (vote,) = judged(served)
    assert (vote.choice, vote.flag, vote.rating) == ("tie", "a mistake", 4)


def test_a_double_click_and_a_lost_answer_are_one_vote(served, tab):
    opened = tab()
    page = ready(opened.open())
    page.dblclick("[data-choice=left]")
    saved(served, page, 1)
    ready(page)
    sent = []

    def lose(route):  # the server stores it, and its answer is lost
        sent.append(route.request.post_data_json)
        if len(sent) < 3:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/page/votes", lose)
    page.click("[data-choice=right]")
    page.wait_for_selector("#compare-status:has-text('not saved yet')")
    for _ in range(600):  # wait_for_function needs eval, which the page's policy forbids
        if page.evaluate("localStorage.pending === undefined"):
            break
        page.wait_for_timeout(100)
    assert len(sent) == 3 and len({body["key"] for body in sent}) == 1
    assert [vote.choice for vote in judged(served)] == ["left", "right"]


def test_a_tab_that_is_closed_before_the_answer_sends_its_vote_again(served, tab):
    first = tab()
    page = ready(first.open())
    page.route("**/page/votes", lambda route: route.abort())
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#compare-status:has-text('not saved yet')")
    page.close()
    assert judged(served) == []
    page = tab(context=first.page.context).open()
    saved(served, page, 1)
    assert judged(served)[0].choice == "right"


def test_two_tabs_of_a_rater_are_one_vote(served, tab):
    one = tab()
    two = tab(context=one.page.context)
    pages = [ready(each.open()) for each in (one, two)]
    assert pages[0].inner_text("#compare-left") == pages[1].inner_text("#compare-left")
    pages[0].click("[data-choice=left]")
    saved(served, pages[0], 1)
    pages[1].click("[data-choice=right]")
    pages[1].wait_for_selector("#last-text:has-text('has voted')")
    assert [vote.choice for vote in judged(served)] == ["left"]


def test_an_own_prompt_and_its_markup_stay_text(served, tab):
    opened = tab(name="<b>ann</b>")
    page = ready(opened.open())
    page.click("#own summary")
    page.fill("#own-text", "<script>document.title='broken'</script>")
    page.click("#own-form button")
    page.wait_for_selector("#compare-prompt:has-text('<script>')")
    assert page.inner_text("#compare-left").startswith("<img src=x onerror=")
    page.click("#compare-more summary")
    page.fill("textarea[name=reason]", "<img src=x onerror=\"document.title='broken'\">")
    page.click("[data-choice=tie]")
    saved(served, page, 1)
    page.click("nav a[href='#results']")
    page.wait_for_selector(".vote summary")
    page.click(".vote summary")
    assert "<img src=x onerror=" in page.inner_text(".vote") and "<b>ann</b>" in page.inner_text(".vote summary")
    assert (
        page.title() == "Results · rlhf_ray"
        and page.locator("main img, main script, main b:has-text('bold')").count() == 0
    )
    assert not opened.faults


def test_an_invited_rater_comes_by_a_link(served, tab):
    token = invite(served.store.database, "Zoë")
    page = ready(tab(name="").open(f"#token={token}"))
    assert page.url == f"{served.url}/#compare" and page.inner_text("#who") == "Zoë"
    page.keyboard.press("3")
    saved(served, page, 1)
    assert judged(served)[0].rater == "Zoë"


def test_by_keyboard_alone(served, tab):
    page = ready(tab().open())
    page.reload()
    ready(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Tab")
    seen = []
    for _ in range(40):
        seen.append(page.evaluate("document.activeElement.dataset.choice ?? document.activeElement.id ?? ''"))
        if seen[-1] == "tie":
            break
        page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert seen[-1] == "tie" and "left" in seen and outline == "3px", seen
    page.keyboard.press("Enter")
    saved(served, page, 1)
    page.uncheck("#keys")
    page.evaluate("document.activeElement.blur()")
    ready(page).keyboard.press("1")
    page.wait_for_timeout(300)
    assert [vote.choice for vote in judged(served)] == ["tie"]


# -- the other views


def test_the_chat_streams_and_can_be_stopped(chromium, tmp_path):  # noqa: F811
    with paged(tmp_path, step_s=0.02) as served:
        context = context_of(chromium, "desk")
        opened = Tab(context, served.url)
        page = opened.open("#chat")
        page.select_option("#chat-model", "ppo")
        page.fill("#chat-text", "Tell me of roses")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn.assistant:has-text('Roses want')")
        assert len(page.inner_text(".turn.assistant")) < len(SCRIPT["ppo"]["roses"])
        page.wait_for_selector(".turn.assistant:has-text('first bloom.')")
        assert page.inner_text(".turn.assistant") == SCRIPT["ppo"]["roses"]
        page.fill("#chat-text", "And the roses again")
        page.click("#chat-send")
        page.wait_for_selector(".turn.assistant:nth-of-type(4):has-text('Roses')")
        page.click("#chat-send")
        page.wait_for_selector("#chat-send:has-text('Send')")
        assert len(page.inner_text(".turn.assistant:nth-of-type(4)")) < len(SCRIPT["ppo"]["roses"])
        shoot(page, "chat-desk")
        assert not opened.faults
        context.close()


@pytest.mark.parametrize("size", SIZES)
def test_results_show_versions_raters_days_and_each_vote(served, tab, size):
    for rater in ("ann", "bob", "cat"):
        for place in range(6):
            told = served.ask(rater, fresh=place > 2).json()
            better = "left" if told["left"]["text"] in SCRIPT["ppo"].values() else "right"
            choice = {3: "tie", 5: "left"}.get(place, better)
            served.vote(told["comparison"], choice, rater, reason="Clear and friendly." if place == 1 else None)
    opened = tab(size)
    page = opened.open("#results")
    page.wait_for_selector(".vote summary")
    shoot(page, f"results-{size}")
    rows = page.locator("table").first.locator("tbody tr")
    assert rows.count() == 2 and rows.first.inner_text().startswith("ppo@1")
    assert page.inner_text(".tile:first-child b") == "18"
    page.locator(".vote summary").first.click()
    assert page.locator(".vote[open] article").count() == 2 and "ppo@1" in page.locator(".vote[open]").inner_text()
    shoot(page, f"vote-{size}")
    page.select_option("#results-filters [name=rater]", "bob")
    page.wait_for_selector(".tile:first-child b:text-is('6')")
    assert page.locator(".vote").count() == 6 and not opened.faults


@pytest.mark.parametrize("size", SIZES)
def test_the_playground_colours_tokens(served, tab, size):
    opened = tab(size)
    page = opened.open("#playground")
    page.fill("#playground-form textarea", PROMPTS[0])
    page.select_option("[name=one]", "ppo")
    page.select_option("[name=two]", "sft")
    page.select_option("[name=reference]", "sft")
    page.click("#playground-form button")
    page.wait_for_selector(".tokens span")
    assert page.locator(".tokens").first.inner_text().startswith("Roses want") and page.locator(".tokens").count() == 2
    paints = (
        "[...document.querySelectorAll('.tokens')[1].children].map((each) => getComputedStyle(each).backgroundColor)"
    )
    by_logprob = page.evaluate(paints)
    page.check("[value=kl]")
    assert len(set(by_logprob)) > 3 and len(set(page.evaluate(paints))) == 1  # its own reference
    page.check("[value=value]")  # of the first model alone there is a critic
    assert len(set(page.evaluate(paints.replace("[1]", "[0]")))) > 3 and len(set(page.evaluate(paints))) == 1
    page.focus(".tokens >> nth=0")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "value before it" in page.locator(".figures").first.inner_text()
    assert re.search(r"log-prob −\d.*reference −\d", page.locator(".figures").first.inner_text())
    shoot(page, f"playground-{size}")
    assert not opened.faults


@pytest.mark.parametrize("size", SIZES)
def test_every_view_fits_and_every_control_has_a_name(served, tab, size):
    page = tab(size).open()
    ready(page)
    for view in VIEWS:
        page.click(f"nav a[href='#{view}']")
        page.wait_for_selector(f"#view-{view}:visible")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, textarea, a')].filter((each) =>
            each.checkVisibility() && !each.labels?.length && !each.ariaLabel &&
            !each.textContent.trim()).map((each) => each.outerHTML)""")
        assert unnamed == [] and page.locator("nav [aria-current=page]").inner_text().lower() == view
        small = page.evaluate("""[...document.querySelectorAll('button, select, nav a')].filter((each) => each.checkVisibility()
            && each.getBoundingClientRect().height < 36).map((each) => each.outerHTML)""")
        assert small == []
    assert page.locator("h1:visible").count() == 1


def luminance(colour):
    """WCAG 2's relative luminance of 'rgb(r, g, b)'."""
    parts = [int(each) / 255 for each in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch_and_can_be_read(served, tab, scheme):
    page = ready(tab(color_scheme=scheme).open())

    def ground():
        return luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert (ground() < 0.2) == (scheme == "dark")
    shoot(page, f"compare-{scheme}")
    pairs = page.evaluate("""[...document.querySelectorAll('h1, h2, .hint, .text, nav a, button, .prompt')].filter((each) =>
        each.checkVisibility()).map((each) => {
            let ground = each;
            while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
            return [getComputedStyle(each).color, getComputedStyle(ground).backgroundColor, each.outerHTML.slice(0, 60)];
        })""")
    for ink, paper, what in pairs:
        dark, light = sorted((luminance(ink), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what
    page.click("#theme")
    assert (ground() < 0.2) != (scheme == "dark")
    page.reload()
    assert (ground() < 0.2) != (scheme == "dark")  # it is remembered
