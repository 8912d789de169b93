"""The page that shows a running server, in a real browser."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

import pytest
from page_server import Scene, many_nodes, node
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.slow

DASH = "\N{EN DASH}"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"


def ask(page: Page, question: str = "When did the bridge open?") -> None:
    page.fill("#question", question)
    page.click("#run")


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id")


def tab_to(page: Page, selector: str, limit: int = 60) -> int:
    for presses in range(limit):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return presses
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def test_the_header_says_what_is_served_and_that_it_is_well(page: Page, scene: Scene) -> None:
    expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
    expect(page.locator("#mode")).to_have_text("base_lr_shared")
    expect(page.locator("#mode-words")).to_contain_text("share the base cache and the LR cache")
    expect(page.locator("#uptime")).to_have_text("1 h 15 min")
    expect(page.locator("#health")).to_contain_text("Alive")
    scene.state["alive"] = False
    expect(page.locator("#health")).to_contain_text("Dead")


def test_roles_and_totals_are_shown(page: Page) -> None:
    names = page.locator("#roles-body th .role-name > span").all_inner_texts()
    assert names == ["base", "plan", "action", "reflect"]
    assert page.locator("#roles-body tr").nth(1).locator("td").all_inner_texts() == [
        "12",
        "1",
        "9,310",
        "2,140",
        "77 %",
        "410",
    ]
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#waiting")).to_have_text("2")
    expect(page.locator("#ttft-95")).to_have_text("30.1 ms")
    expect(page.locator("#total-lr-prefilled")).to_have_text("0")


def test_rates_are_differences_between_polls(page: Page) -> None:
    expect(page.locator("#prompt-rate")).to_have_text(DASH)
    expect(page.locator("#generated-line")).to_have_attribute("d", re.compile(r"M[\d. ]+L"))
    assert 20 < float(page.inner_text("#prompt-rate")) < 130  # 120 a poll, and a poll takes a little over a second


def test_the_picture_has_every_node_where_it_belongs(page: Page, scene: Scene) -> None:
    expect(page.locator("#icicle .node")).to_have_count(len(scene.state["cache"]["nodes"]))
    box = {i: page.locator(f'#icicle .node[data-id="{i}"] .ground').bounding_box() for i in (1, 2, 3, 4, 5, 6)}
    assert box[2]["x"] == pytest.approx(box[1]["x"] + box[1]["width"], abs=2)
    assert box[1]["height"] == pytest.approx(3 * box[4]["height"], abs=6)  # three leaves go on from it
    assert box[2]["height"] == pytest.approx(2 * box[4]["height"], abs=4)
    assert box[5]["y"] > box[4]["y"] > box[3]["y"]
    assert box[6]["y"] > box[5]["y"]
    first = page.locator('#icicle .node[data-id="2"]')
    assert first.locator(".run").count() == first.locator(".strip").count() == 3
    assert first.locator(".badge.held").text_content() == "1"
    assert first.locator(".badge.shared").text_content() == "3"
    assert len(set(first.locator(".run").evaluate_all("runs => runs.map(run => run.getAttribute('fill'))"))) == 3


def test_the_keyboard_goes_through_the_picture_and_each_node_is_described(page: Page) -> None:
    tab_to(page, '#icicle [data-id="1"]')
    expect(page.locator("#node-title")).to_have_text("Positions 0 to 209: 210 tokens of the base cache of all roles")
    expect(page.locator("#node-words")).to_have_attribute("aria-live", "polite")
    page.keyboard.press("ArrowRight")
    words = page.locator("#node-words")
    expect(words).to_contain_text("Written by plan (64 tokens), action (90 tokens) and reflect (60 tokens).")
    expect(words).to_contain_text("Read by plan, action and reflect.")
    expect(words).to_contain_text("Held by 1 running request now.")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#node-title")).to_contain_text("Positions 210 to 479")
    expect(page.locator("#node-idle")).to_have_text("Idle for 72 s.")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#node-title")).to_contain_text("Positions 0 to 209")
    page.keyboard.press("End")
    expect(page.locator("#node-title")).to_contain_text("Positions 0 to 194")
    page.hover('#icicle [data-id="4"]')
    expect(page.locator("#node-title")).to_contain_text("Positions 424 to 455")


def test_a_poll_keeps_the_focused_node_and_an_eviction_hands_the_focus_on(page: Page, scene: Scene) -> None:
    tab_to(page, '#icicle [data-id="1"]')
    page.keyboard.press("ArrowRight")
    page.evaluate("document.activeElement.mine = true")
    scene.state["cache"]["nodes"][1]["held"] = 3
    expect(page.locator('#icicle [data-id="2"] .badge.held')).to_have_text("3")
    assert page.evaluate("document.activeElement.mine === true")
    # The run is split in two: other nodes stand where the focused one stood.
    kept = scene.state["cache"]["nodes"][0]
    half = node(7, 1, 210, [["plan", 64]], ["plan"])
    scene.state["cache"]["nodes"] = [kept, half, node(8, 7, 274, [["action", 90]], ["action"])]
    expect(page.locator("#icicle .node")).to_have_count(3)
    assert page.evaluate("document.activeElement.dataset.id") == "7"


def test_separate_lr_caches_are_drawn_by_their_owner(open_page: Callable[..., Page], scene: Scene) -> None:
    scene.state["sharing"] = "base_shared"
    owned = [node(20, None, 0, [["plan", 210]], ["plan"]), node(21, None, 0, [["action", 210]], ["action"])]
    for each, owner in zip(owned, ("plan", "action"), strict=True):
        scene.state["cache"]["nodes"].append({**each, "part": "lr", "owner": owner})
    page = open_page()
    titles = page.locator("#icicle .group-titles text")
    expect(titles).to_have_text(["Base cache of all roles", "LR cache of plan", "LR cache of action"])
    expect(page.locator("#icicle .strip")).to_have_count(0)
    expect(page.locator("#legend-strip")).to_be_hidden()


def test_an_empty_cache_says_so_and_a_mode_without_lr_too(open_page: Callable[..., Page], scene: Scene) -> None:
    scene.state["sharing"] = "full_shared"
    scene.state["cache"].update(nodes=[], lr_bytes_used=0, lr_bytes_total=0)
    page = open_page()
    expect(page.locator("#lr-words")).to_have_text("none in this sharing mode")
    expect(page.locator("#cache-empty")).to_be_visible()
    scene.state["cache"]["nodes"] = [node(1, None, 0, [["plan", 9]], ["plan"])]
    expect(page.locator("#cache-empty")).to_be_hidden()


def test_the_cache_as_a_table(page: Page) -> None:
    page.click("#cache-details summary")
    expect(page.locator("#nodes-body tr")).to_have_count(6)
    row = page.locator("#nodes-body tr").nth(2).locator("th, td")
    expect(row).to_have_text(
        [f"424{DASH}591", "168", "base · all roles", "plan 48, action 120", "action, plan", "1", "0.1 s"]
    )


def test_four_hundred_nodes_stay_quick(open_page: Callable[..., Page], scene: Scene) -> None:
    scene.state["cache"]["nodes"] = many_nodes(400)
    page = open_page()
    expect(page.locator("#icicle .node")).to_have_count(400)
    page.evaluate("""() => {
        window.longest = 0;
        new PerformanceObserver(list => {
            for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
        }).observe({ type: 'longtask' });
    }""")
    for each in scene.state["cache"]["nodes"]:
        each["held"] = 2  # every node is drawn anew
    expect(page.locator("#icicle .outline.held")).to_have_count(400)
    page.wait_for_timeout(1500)
    assert page.evaluate("window.longest") < 400  # ms, on a machine that is busy with tests


def test_the_ledger_groups_and_shows_budgets(page: Page) -> None:
    rows = page.locator("#ledger-body th")
    expect(rows).to_have_text(["plan", "action", "reflect"])
    expect(page.locator("#ledger-body tr").first.locator("td").last).to_have_text("0.0061 USD")
    page.select_option("#ledger-group", "key")
    expect(rows).to_have_text(["team-research", "team-support"])
    expect(page.locator("#ledger-by")).to_have_text("API key")
    page.select_option("#ledger-group", "trajectory")
    expect(rows).to_have_text(["page-17-4", "(none given)"])
    expect(page.locator("#ledger-total")).to_have_text("0.0123 USD")
    expect(page.locator("#budgets li").first).to_contain_text("0.75 USD left of 1.00 USD")
    expect(page.locator("#budgets li").last).to_contain_text("Nearly used up")


def test_without_a_ledger_the_page_says_how_to_have_one(page: Page, scene: Scene) -> None:
    scene.state["ledger"] = None
    expect(page.locator("#ledger-off")).to_contain_text("lragent serve --ledger usage.sqlite")
    expect(page.locator("#ledger-on")).to_be_hidden()


def test_the_playground_plays_one_trajectory_of_three_steps(page: Page, scene: Scene) -> None:
    page.click("#play-form summary")
    page.fill("#system", "Be brief.")
    page.locator("#steps li").nth(1).get_by_role("button", name="Add the tool result").click()
    page.keyboard.type("The bridge: opened 1932.")
    page.fill("#max-tokens", "48")
    ask(page)
    expect(page.locator("#play-status")).to_have_text("The trajectory has ended after 3 steps.")
    cards = page.locator("#cards .card")
    expect(cards).to_have_count(3)
    expect(cards.locator(".answer")).to_have_text([scene.answer] * 3)
    expect(cards.nth(1).locator(".tool")).to_contain_text("The bridge: opened 1932.")
    facts = dict(zip(*(cards.nth(2).locator(f".facts {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    sent = 40 * len(scene.requests[2]["messages"])
    expected = {"prompt tokens": sent, "base reused": sent - 17, "LR reused": sent - 17, "computed": 17, "generated": 9}
    assert facts == {name: str(tokens) for name, tokens in expected.items()}
    expect(cards.nth(2).locator(".card-head")).to_contain_text("first token after")
    assert [each["model"] for each in scene.requests] == ["plan", "action", "reflect"]
    assert scene.requests[2]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When did the bridge open?"},
        {"role": "assistant", "name": "plan", "content": scene.answer},
        {"role": "assistant", "name": "action", "content": scene.answer},
        {"role": "tool", "content": "The bridge: opened 1932."},
    ]
    last = scene.requests[2]
    assert (last["max_tokens"], last["temperature"], last["stream"]) == (48, 0, True)
    assert last["stream_options"] == {"include_usage": True}
    assert len({each["trajectory_id"] for each in scene.requests}) == 1
    assert last["trajectory_id"].startswith("page-")


def test_steps_are_added_moved_and_removed_and_base_gets_no_name(page: Page, scene: Scene) -> None:
    page.get_by_role("button", name="Remove step 3").click()
    page.get_by_role("button", name="Move step 2 up").click()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Move step 1 up"
    page.click("#add-step")
    page.get_by_role("combobox", name="Role of step 3").select_option("base")
    page.click("#add-step")
    ask(page)
    expect(page.locator("#play-status")).to_have_text("The trajectory has ended after 4 steps.")
    assert [each["model"] for each in scene.requests] == ["action", "plan", "base", "base"]
    assert scene.requests[3]["messages"][-1] == {"role": "assistant", "content": scene.answer}


def test_stop_ends_the_stream(page: Page, scene: Scene) -> None:
    scene.hold = threading.Event()
    ask(page)
    expect(page.locator("#cards .answer")).to_have_text("I")  # shown while the rest is still to come
    page.click("#run", force=True)  # does nothing while a trajectory is played
    page.click("#stop")
    expect(page.locator("#play-status")).to_have_text("Stopped.")
    expect(page.locator("#cards .card-head")).to_contain_text("broken off")
    expect(page.locator("#play-error")).to_be_hidden()
    assert scene.gone.wait(5)
    assert len(scene.requests) == 1
    scene.hold = None
    page.click("#run")
    expect(page.locator("#play-status")).to_have_text("The trajectory has ended after 3 steps.")


def test_a_refusal_is_shown_in_the_servers_words(open_page: Callable[..., Page], scene: Scene) -> None:
    scene.error = (400, "max_tokens: must be between 1 and 2048 (the context of this model), not 9999.")
    page = open_page(errors=True)  # the browser itself reports the status
    expect(page.locator("#steps li")).to_have_count(3)
    ask(page)
    expect(page.get_by_role("alert").filter(has_text="max_tokens")).to_have_text(scene.error[1])
    scene.error = None
    scene.broken = "The engine has stopped."
    page.click("#run")
    expect(page.locator("#play-error")).to_have_text("The engine has stopped.")
    assert len(scene.requests) == 2  # the steps after the one that failed are not asked


def test_a_locked_server_is_given_the_key_and_nothing_else_keeps_it(
    open_page: Callable[..., Page], scene: Scene
) -> None:
    scene.key = "secret"
    page = open_page(errors=True)
    expect(page.locator("#lock-words")).to_have_text("This server asks for an API key.")
    page.wait_for_timeout(1500)
    assert scene.keys == [None]  # it does not knock once a second
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#lock-words")).to_have_text("The server does not know this API key.")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#roles-body tr")).to_have_count(4)
    expect(page.locator("#lock")).to_be_hidden()
    assert scene.keys[-1] == "Bearer secret"
    ask(page)
    expect(page.locator("#cards .card")).to_have_count(3)
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]


def test_html_from_the_server_stays_text(open_page: Callable[..., Page], scene: Scene) -> None:
    scene.answer = HOSTILE
    scene.state["model"] = HOSTILE
    scene.state["roles"][1]["name"] = HOSTILE
    scene.state["cache"]["nodes"][0].update(owner=HOSTILE, writers=[[HOSTILE, 210]], readers=[HOSTILE, "plan"])
    scene.state["ledger"]["groups"]["role"][0]["name"] = HOSTILE
    scene.state["ledger"]["budgets"][0]["name"] = HOSTILE
    page = open_page()
    expect(page.locator("#model")).to_have_text(HOSTILE)
    page.click("#cache-details summary")
    page.hover('#icicle [data-id="1"]', position={"x": 5, "y": 5})
    ask(page)
    expect(page.locator("#cards .answer").first).to_have_text(HOSTILE)
    expect(page.locator("#ledger-body th").first).to_have_text(HOSTILE)
    assert page.locator("img, b").count() == 0
    assert page.title() == "LRAgent"


def test_a_silent_server_is_told_of_and_found_again(page: Page) -> None:
    page.route("**/page/state.json", lambda route: route.fulfill(status=200, body="no JSON"))
    expect(page.locator("#health")).to_contain_text("No answer")
    expect(page.locator("#model")).to_have_text("SmolLM2-135M-Instruct")
    page.unroute("**/page/state.json")
    expect(page.locator("#health")).to_contain_text("Alive")


def test_the_keyboard_alone_reaches_run_and_every_stop_is_seen(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert focused(page) == "main"
    tab_to(page, "#ledger-group")
    tab_to(page, "#question")
    page.keyboard.type("When did the bridge open?")
    tab_to(page, "#run")
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    page.keyboard.press("Enter")
    expect(page.locator("#play-status")).to_have_text("The trajectory has ended after 3 steps.")
    assert focused(page) == "run"


def test_every_control_has_a_name(page: Page) -> None:
    for control in page.locator("button, input, select, textarea").all():
        if control.is_visible():
            named = control.evaluate("it => it.getAttribute('aria-label') || it.labels?.length || it.textContent")
            assert named, control.evaluate("it => it.outerHTML")


def test_a_poll_moves_and_rebuilds_nothing(page: Page, scene: Scene) -> None:
    page.focus("#question")
    page.evaluate("""() => {
        document.activeElement.mine = true;
        document.querySelector('#steps select').mine = true;
        document.querySelector('#roles-body tr').mine = true;
    }""")
    before = page.evaluate("document.documentElement.scrollHeight")
    asked = len(scene.keys)
    deadline = time.monotonic() + 10
    while len(scene.keys) < asked + 3 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollHeight") == before
    assert page.evaluate("document.activeElement.mine && document.querySelector('#steps select').mine")
    assert page.evaluate("document.querySelector('#roles-body tr').mine")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    expect(page.locator("#roles-body tr")).to_have_count(4)
    ask(page)
    expect(page.locator("#cards .card")).to_have_count(3)
    too_pale = page.evaluate("""() => {
        const parse = colour => colour.match(/[\\d.]+/g).map(Number);
        const luminance = ([r, g, b]) => [r, g, b]
            .map(value => value / 255)
            .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
            .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
        const ground = node => {
            for (let at = node; at; at = at.parentElement) {
                const colour = parse(getComputedStyle(at).backgroundColor);
                if (colour.length === 3 || colour[3] > 0) return colour;
            }
        };
        const found = [];
        for (const node of document.querySelectorAll('body *:not(svg *)')) {
            const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
            if (!own || !node.checkVisibility()) continue;
            const [a, b] = [luminance(parse(getComputedStyle(node).color)), luminance(ground(node))];
            const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            if (contrast < 4.5) found.push([node.textContent.slice(0, 40), node.className, contrast]);
        }
        return found;
    }""")
    assert not too_pale


@pytest.mark.parametrize("width", [360, 700, 1280, 1920])
def test_no_width_scrolls_sideways(open_page: Callable[..., Page], width: int, scene: Scene) -> None:
    scene.state["roles"].append({**scene.state["roles"][1], "name": "a-role-with-a-very-long-name-" * 4})
    page = open_page(viewport={"width": width, "height": 800})
    expect(page.locator("#roles-body tr")).to_have_count(5)
    ask(page)
    expect(page.locator("#cards .card")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
