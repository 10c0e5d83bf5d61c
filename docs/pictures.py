"""Takes the screenshots of docs/labeling.md, the bundled model's own completions ranked by simulated labelers, and of docs/look-inside.md.

.venv/bin/python docs/pictures.py
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def look_inside(browser):
    import accord
    from accord.inside.page import as_page

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inside.html"
        path.write_text(as_page(accord.trace(accord.load(dtype="float32"), "The cat sat on the mat because it was tired")))
        page = browser.new_page(viewport={"width": 1180, "height": 1500})
        page.goto(path.as_uri())
        page.locator("#tokens button").nth(7).click()
        page.locator("#layer").evaluate("(slider) => { slider.value = 9; slider.dispatchEvent(new Event('input')); }")
        page.evaluate("document.querySelector('#embedding').scrollIntoView()")
        page.screenshot(path=HERE / "look-inside.png")


def main():
    from playwright.sync_api import sync_playwright

    import accord
    from accord.config import Recipe
    from accord.feedback.intake import set_criterion
    from accord.feedback.store import Label, QueueSettings, Store
    from accord.feedback.web.serve import address, listen, serving, web_settings
    from accord.feedback.web.site import COOKIE
    from accord.pipeline import recipe_prompts

    prompts = [p for p in recipe_prompts(Recipe()) if p.theme != "harmful"][::12][:40]
    completions = accord.by_prompt(accord.sample(accord.load(), prompts, per_prompt=4, max_new_tokens=60, temperature=0.7))
    ranked = accord.simulated_panel("hhh").rank(completions)
    said = {(r.labeler, r.prompt_id): r.ranks for r in ranked.rankings}
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "labels.db", QueueSettings(overlap=3, gold_share=0, repeat_share=0))
        set_criterion(store, None)
        store.add_items(completions)
        for name in sorted({r.labeler for r in ranked.rankings}):
            person = store.people.add(name, "labeler")
            for seconds in range(25, 25 + 34):
                given = store.next(person)
                store.submit(person, given.id, Label(ranks=said[name, given.prompt.id]), f"simulated-{given.id}", float(seconds))
        invitation, listening = store.people.invite("reviewer"), listen("127.0.0.1", 0)
        owner = store.people.add("olga", "owner", "four small words here")
        cookie = {"name": f"{COOKIE}{store.id[:8]}", "value": store.people.log_in(owner), "domain": "127.0.0.1", "path": "/"}
        with serving(store, web_settings(store, "127.0.0.1", True), listening), sync_playwright() as play:
            browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
            look_inside(browser)

            def page_of(cookies=(cookie,), **more):
                context = browser.new_context(**{"viewport": {"width": 1240, "height": 860}, "reduced_motion": "reduce"} | more)
                context.add_cookies(list(cookies))
                return context.new_page()

            page = page_of(cookies=(), viewport={"width": 820, "height": 560})
            for name, path in (("login", "/login"), ("invitation", f"/invite/{invitation}")):
                page.goto(address(listening) + path)
                page.wait_for_selector("form.door")
                page.screenshot(path=HERE / f"{name}.png")
            page = page_of()
            page.goto(address(listening))
            page.wait_for_selector(".answer")
            for key in ("2", "1", "2", "ArrowUp", "r", "6", "x", "2"):
                page.keyboard.press(key)
            page.screenshot(path=HERE / "labeling.png")
            page.goto(address(listening) + "/instructions")
            page.screenshot(path=HERE / "instructions.png")
            page.goto(address(listening) + "/overview")
            page.click("#disputed a >> nth=0")
            page.click("text=Decide it")
            page.wait_for_selector(".answer")
            for key in ("1", "2", "3", "f", "Enter"):
                page.keyboard.press(key)
            page.wait_for_url("**/overview*")
            page.click("#disputed a >> nth=0")
            page.wait_for_selector("text=Decide it again")
            page.screenshot(path=HERE / "disputed.png")
            page.goto(address(listening) + "/overview")
            page.screenshot(path=HERE / "overview.png", full_page=True)
            phone = page_of(viewport={"width": 390, "height": 780}, color_scheme="dark", device_scale_factor=2)
            phone.goto(address(listening))
            phone.wait_for_selector(".answer")
            phone.screenshot(path=HERE / "labeling-phone.png")
            browser.close()
        store.close()


if __name__ == "__main__":
    main()
