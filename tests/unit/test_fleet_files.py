"""fleet.yaml: every problem at once with its place, waves, and which targets are meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from reconciler.errors import InputError, UsageError
from reconciler.fleet import files, members, waves
from reconciler.fleet.files import Canary, Member, Percent
from tests.states import STATE, write

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
fleet:
  version: 1
  name: shops
  state: state
  target: main
  targets:
    - {name: shop-1, dsn: "host=db1 dbname=shop", labels: {region: eu}}
    - {name: shop-2, service: shop_2, labels: {region: us}}
    - from: {service: catalogue, query: "SELECT name, dsn FROM fleet.target"}
  waves: [{canary: [shop-1]}, {canary: {region: us}}, {percent: 50}, {percent: 100}]
  workers: 8
  schedule: "*/10 * * * *"
"""


def problems(root: Path, text: str) -> list[str]:
    write(root / "state", STATE)
    file = root / "fleet.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as found:
        files.load(file)
    return [str(one).removeprefix(f"{root}/") for one in found.value.problems]


def test_a_good_file(tmp_path: Path) -> None:
    write(tmp_path / "state", STATE)
    file = tmp_path / "fleet.yaml"
    file.write_text(GOOD)
    fleet = files.load(file)
    assert (fleet.name, fleet.declared.workers, len(fleet.declared.targets)) == ("shops", 8, 3)
    member = Member("shop-1", "host=db1", {})
    own = fleet.of(member)
    assert (own.target, own.items, own.checks) == ("shop-1", fleet.settings.items, fleet.settings.checks)


def test_every_problem_at_once_with_its_place(tmp_path: Path) -> None:
    text = """\
fleet:
  version: 2
  name: Shops
  state: state
  target: main
  color: blue
  targets:
    - {name: "shop 1", dsn: "host=db1 dbname=shop"}
    - {name: shop-2, dsn: "host=db1 dbname=shop", lables: {}}
  workers: 0
  schedule: daily
gates: {}
"""
    found = problems(tmp_path, text)
    assert [one.split(": ")[0] for one in found] == [
        "fleet.yaml:2:12",
        "fleet.yaml:3:9",
        "fleet.yaml:6:3",
        "fleet.yaml:8:14",
        "fleet.yaml:9:51",
        "fleet.yaml:10:12",
        "fleet.yaml:11:13",
        "fleet.yaml:12:1",
    ]


@pytest.mark.parametrize(
    ("line", "instead", "place", "sentence"),
    [
        ("name: shop-2,", "name: shop-1,", "8:14", "already the name of entry 1"),
        (
            "service: shop_2,",
            'dsn: "host=DB1 port=5432 dbname=shop user=other",',
            "8:7",
            "this is the database of 'shop-1'",
        ),
        ("service: shop_2,", "", "8:7", "needs `dsn` or `service`"),
        ("service: shop_2,", 'service: shop_2, dsn: "host=x",', "8:7", "and not both"),
        ("service: shop_2,", 'dsn: "host",', "8:27", "is no connection string"),
        ("service: shop_2,", 'dsn: "host=x password=hunter2",', "8:27", "holds a password"),
        ("service: shop_2,", 'dsn: "postgresql://me:hunter2@x/shop",', "8:27", "holds a password"),
        ("SELECT name, dsn FROM fleet.target", "DELETE FROM fleet.target", "9:41", "SELECT"),
        ("SELECT name, dsn FROM fleet.target", "SELECT name FROM target", "9:41", "schema"),
        ("SELECT name, dsn FROM fleet.target", "SELECT pg_catalog.pg_read_file('x') AS name", "9:41", "pg_read_file"),
        ("{percent: 100}", "{percent: 90}", "10:70", "the last wave must be `percent: 100`"),
        ("{percent: 50}", "{percent: 100}", "10:81", "must be more than the 100 before it"),
        ("{percent: 50}", "{canary: []}", "10:64", "names nobody"),
        (
            "{canary: {region: us}}, {percent: 50}",
            "{percent: 50}, {canary: {region: us}}",
            "10:46",
            "before every percent",
        ),
        ("target: main", "target: test", "", ""),
        ("state: state", "state: nowhere", "", ""),
    ],
)
def test_a_problem_and_its_place(tmp_path: Path, line: str, instead: str, place: str, sentence: str) -> None:
    text = GOOD.replace(line, instead)
    if not place:
        write(tmp_path / "state", STATE)
        (tmp_path / "fleet.yaml").write_text(text)
        with pytest.raises(UsageError):
            files.load(tmp_path / "fleet.yaml")
        return
    found = problems(tmp_path, text)
    assert any(one.startswith(f"fleet.yaml:{place}: ") and sentence in one for one in found), found
    assert "hunter2" not in str(found)


def test_a_canary_that_nobody_is(tmp_path: Path) -> None:
    without = "\n".join(line for line in GOOD.splitlines() if "from:" not in line)
    (found,) = problems(tmp_path, without.replace("[shop-1]", "[shop-9]"))
    assert "there is no target 'shop-9'" in found


def test_problems_of_the_state_files_are_told_too(tmp_path: Path) -> None:
    write(tmp_path / "state", STATE)
    (tmp_path / "state" / "more.yaml").write_text("gates: {app.enabled: {}}\n")
    (tmp_path / "fleet.yaml").write_text(GOOD.replace("percent: 50", "percent: 100"))
    with pytest.raises(InputError) as found:
        files.load(tmp_path / "fleet.yaml")
    assert {one.file.rpartition("/")[2] for one in found.value.problems} == {"fleet.yaml", "more.yaml"}


def test_a_member_is_no_other_target_of_the_state_files(tmp_path: Path) -> None:
    write(tmp_path / "state", STATE)
    governance = tmp_path / "state" / "governance.yaml"
    governance.write_text(governance.read_text().replace("{main: {}}", "{main: {}, shop-1: {database: other}}"))
    (tmp_path / "fleet.yaml").write_text(GOOD)
    with pytest.raises(InputError, match="1 problem") as found:
        files.load(tmp_path / "fleet.yaml")
    assert "settings of its own" in str(found.value.problems[0])


def member(number: int, **labels: str) -> Member:
    return Member(f"shop-{number:03}", f"host=db{number}", labels)


def test_selection() -> None:
    fleet = [member(1, region="eu", tier="gold"), member(2, region="eu"), member(3, region="us")]

    def names(select: list[str], *only: str) -> list[str]:
        return [one.name for one in members.choose(fleet, select, only)]

    assert names([]) == ["shop-001", "shop-002", "shop-003"]
    assert names(["region=eu"]) == ["shop-001", "shop-002"]
    assert names(["region=eu", "tier=gold"]) == ["shop-001"]
    assert names([], "shop-003", "shop-001") == ["shop-001", "shop-003"]
    for select, only in (
        (["region"], ()),
        (["region=eu", "region=us"], ()),
        (["region=mars"], ()),
        ([], ("shop-9",)),
        (["region=us"], ("shop-001",)),
    ):
        with pytest.raises(UsageError):
            members.choose(fleet, select, only)


def test_waves_are_in_the_order_of_the_file() -> None:
    fleet = [member(number, stage="canary" if number == 7 else "rest") for number in range(1, 21)]
    declared = (
        Canary(canary=("shop-005",)),
        Canary(canary={"stage": "canary"}),
        Percent(percent=25),
        Percent(percent=100),
    )
    placed = waves.assign(declared, fleet)
    assert [name for name, wave in placed.items() if wave == 1] == ["shop-005"]
    assert [name for name, wave in placed.items() if wave == 2] == ["shop-007"]
    assert [name for name, wave in placed.items() if wave == 3] == ["shop-001", "shop-002", "shop-003"]
    assert len(placed) == 20


@given(number=some.integers(1, 300), percents=some.sets(some.integers(1, 99), max_size=5), canaries=some.integers(0, 5))
def test_everybody_is_in_one_wave_and_no_percent_is_exceeded(number: int, percents: set[int], canaries: int) -> None:
    fleet = [member(index) for index in range(1, number + 1)]
    first: list[Any] = [Canary(canary=tuple(one.name for one in fleet[:canaries]))] if canaries else []
    declared = (*first, *(Percent(percent=one) for one in (*sorted(percents), 100)))
    placed = waves.assign(declared, fleet)
    assert sorted(placed) == [one.name for one in fleet]
    for index, wave in enumerate(declared, 1):
        done = sum(where <= index for where in placed.values())
        if isinstance(wave, Percent):
            assert done >= number * wave.percent / 100
            assert done < number * wave.percent / 100 + 1 or done == min(canaries, number)


def test_no_waves_are_one() -> None:
    assert set(waves.assign((), [member(1), member(2)]).values()) == {1}


def test_a_connection_string_is_shown_by_nobody() -> None:
    assert "secret" not in repr(Member("a", "password=secret", {}))
