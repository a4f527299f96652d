"""docs/plan.md says what the configs and the measured figures say."""

from tools.make_plan_tables import PAGE, page


def test_the_tables_are_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run tools/make_plan_tables.py"
