"""Jobs: what a Job checks, and how ``load`` finds one, reads its arguments and explains what is wrong."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from orchestrator.config import AdamW, Recipe, RunConfig, Stop
from orchestrator.errors import ConfigError, DataError, JobError
from orchestrator.job import Dataset, Datasets, Job, Parquet, _bind, load

CONFIG = RunConfig(name="tiny", recipe=Recipe(batch=8, optimizer=AdamW(learning_rate=1e-3), stop=Stop(steps=3)))

HEADER = """
from orchestrator.config import AdamW, Recipe, RunConfig, Stop
from orchestrator.errors import DataError
from orchestrator.job import Datasets, Job, Parquet

class Task:
    def datasets(self): return Datasets(Parquet("x"))
    def model(self): ...
    def loss(self, model, batch): ...
    def metrics(self, model, batch): ...

def config(**fields):
    return RunConfig(**{
        "name": "tiny",
        "recipe": Recipe(batch=8, optimizer=AdamW(learning_rate=1e-3), stop=Stop(steps=3)),
        **fields,
    })
"""


class Task:
    def datasets(self): ...
    def model(self): ...
    def loss(self, model, batch): ...
    def metrics(self, model, batch): ...


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def module(body: str, path: str = "mine.py", header: str = HEADER) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(header + textwrap.dedent(body))
        return file

    yield module
    written = {Path(entry.name).stem for entry in tmp_path.iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in written:
            del sys.modules[name]
    importlib.invalidate_caches()


def refusal(target: str, *args: str) -> str:
    with pytest.raises(JobError) as caught:
        load(target, args)
    return str(caught.value)


# -- the values --------------------------------------------------------------------------------


def test_a_job_names_the_verbs_its_task_lacks():
    class Half:
        def model(self): ...
        def loss(self, model, batch): ...

    with pytest.raises(JobError) as caught:
        Job(CONFIG, Half())
    assert str(caught.value) == (
        "task Half lacks datasets and metrics: a task has the methods datasets, model, loss and metrics"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Job({}, Task()), "Job.config is a dict: give an orchestrator.config.RunConfig"),
        (lambda: Job(CONFIG, Task), "Job.task is the class Task: give an instance, as in Task()"),
        (lambda: Job(CONFIG, Task(), prepare=3), "Job.prepare is a int: give a function without parameters"),
        (lambda: Datasets([1]), "Datasets.train is a list: give a Parquet, or an object with __len__ and take"),
        (lambda: Datasets(None), "Datasets.train is a NoneType: give a Parquet, or an object with __len__ and take"),
        (
            lambda: Datasets(Parquet("x"), "y"),
            "Datasets.evaluation is a str: give a Parquet, or an object with __len__ and take",
        ),
    ],
)
def test_values_check_themselves(build, message):
    with pytest.raises(JobError) as caught:
        build()
    assert str(caught.value) == message


def test_anything_with_the_two_verbs_is_a_dataset():
    class Rows:
        def __len__(self):
            return 3

        def take(self, positions): return {"x": positions}  # fmt: skip

    assert isinstance(Rows(), Dataset)
    assert Datasets(Rows(), Rows()).evaluation is not None


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Parquet("x").uri = "y"


# -- finding -----------------------------------------------------------------------------------


def test_load_calls_the_function_and_applies_overrides(write):
    write("def tiny(steps: int = 3, name: str = 'a') -> Job:\n    return Job(config(name=name, seed=steps), Task())\n")
    job = load("mine:tiny", ["steps=5", "name=bc"], ["recipe.batch=16"])
    assert (job.config.name, job.config.seed, job.config.recipe.batch) == ("bc", 5, 16)


def test_load_finds_modules_in_packages_of_the_working_directory(write):
    write("def tiny() -> Job:\n    return Job(config(), Task())\n", "pack/inner/mine.py")
    assert load("pack.inner.mine:tiny").config.name == "tiny"


@pytest.mark.parametrize(
    "target", ["", "mine", "mine:", ":tiny", "mine.py:tiny.", "a/b:c", "mine:tiny()", "mine: tiny", "..x:y", "a:b:c"]
)
def test_a_target_is_module_and_function(target):
    assert refusal(target) == f"job {target!r}: write it as module:function, as in jobs.vision:digits"


@given(st.text(max_size=12))
def test_no_text_gets_past_the_form(target):
    if not all(part.isidentifier() for part in target.replace(":", ".", 1).split(".")):
        with pytest.raises(JobError):
            load(target)


def test_a_module_that_is_not_there(write, tmp_path):
    assert refusal("mine:tiny") == (
        f"job 'mine:tiny': there is no module 'mine'; run from the folder that holds it (this is {tmp_path}), "
        "or install it"
    )


def test_a_module_that_is_not_in_its_package(write):
    write("", "pack/__init__.py")
    assert refusal("pack.vision:tiny") == (
        "job 'pack.vision:tiny': there is no module 'pack.vision'; the package 'pack' has no modules"
    )
    write("", "pack/visions.py")
    assert refusal("pack.vision:tiny") == (
        "job 'pack.vision:tiny': there is no module 'pack.vision'; did you mean 'visions'? valid: visions"
    )


def test_a_module_taken_for_a_package(write):
    write("def tiny() -> Job: ...\n")
    assert refusal("mine.tiny:run") == (
        "job 'mine.tiny:run': there is no module 'mine.tiny'; 'mine' is a module, not a package: "
        "name a function of it, as in mine:tiny"
    )


def test_a_function_that_is_not_there(write):
    write("def tiny() -> Job: ...\ndef big() -> 'Job': ...\ndef other(): ...\ndef _hidden() -> Job: ...\nx = 3\n")
    valid = "did you mean 'tiny'? valid: big, tiny"
    assert refusal("mine:tinny") == f"job 'mine:tinny': 'tinny' does not exist in mine; {valid}"
    assert refusal("mine:x") == "job 'mine:x': 'x' is not a function in mine; valid: big, tiny"
    assert refusal("mine:Task") == "job 'mine:Task': 'Task' is not a function in mine; valid: big, tiny"


def test_a_module_without_jobs(write):
    write("", header="")
    assert refusal("mine:x") == (
        "job 'mine:x': 'x' does not exist in mine; it has no function that returns a Job: write one, with '-> Job'"
    )


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        (
            "import no_such_package.part\n",
            (
                "mine.py:1: import no_such_package.part: ModuleNotFoundError: No module named 'no_such_package'; "
                "install no_such_package, or fix the import"
            ),
        ),
        (
            "x = 1\nfrom json import no_such_name\n",
            (
                "mine.py:2: from json import no_such_name: ImportError: cannot import name 'no_such_name' from 'json' "
                f"({importlib.import_module('json').__file__}); fix the module"
            ),
        ),
        ("\ndef f(:\n", "mine.py:2: def f(:: SyntaxError: invalid syntax; fix the module"),
        ("raise KeyError('x')\n", "mine.py:1: raise KeyError('x'): KeyError: 'x'; fix the module"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: sys.exit(3): SystemExit: 3; fix the module"),
        (
            "import json\njson.loads('')\n",
            ("mine.py:2: json.loads(''): JSONDecodeError: Expecting value: line 1 column 1 (char 0); fix the module"),
        ),
    ],
)
def test_a_module_that_fails_names_the_users_own_line(write, body, finding):
    write(body, header="")
    assert refusal("mine:x") == f"job 'mine:x': importing it failed at {finding}"


def test_the_failing_line_may_be_in_another_module_of_the_users(write):
    write("import helper\n", header="")
    write("\nimport no_such_package\n", "helper.py", header="")
    assert "helper.py:2: import no_such_package: ModuleNotFoundError" in refusal("mine:x")


# -- calling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("return None", "tiny() returns a NoneType: make it return an orchestrator.job.Job"),
        ("return config()", "tiny() returns a RunConfig: make it return an orchestrator.job.Job"),
        (
            "raise ValueError('odd')",
            "tiny() failed at mine.py:20: raise ValueError('odd'): ValueError: odd; fix it, or its --arg",
        ),
        ("assert 0", "tiny() failed at mine.py:20: assert 0: AssertionError; fix it, or its --arg"),
        (
            "config(seed=-1)",
            "tiny() makes a wrong value at mine.py:13: return RunConfig(**{: seed=-1: should be at least 0",
        ),
        (
            "Stop(steps=0)",
            "tiny() makes a wrong value at mine.py:20: Stop(steps=0): Stop: steps=0: should be above 0",
        ),
    ],
)
def test_a_function_that_fails(write, body, finding):
    write(f"\ndef tiny() -> Job:\n    {body}\n")
    assert refusal("mine:tiny") == f"job 'mine:tiny': {finding}"


def test_request_errors_pass_unchanged(write):
    write("def tiny() -> Job:\n    raise DataError('no data')\n")
    with pytest.raises(DataError, match=r"^no data$"):
        load("mine:tiny")
    write("raise DataError('not even here')\n", "other.py")
    with pytest.raises(DataError, match=r"^not even here$"):
        load("other:tiny")


def test_a_field_changed_without_a_check_is_checked(write):
    write("def tiny() -> Job:\n    return Job(config().model_copy(update={'seed': -1}), Task())\n")
    with pytest.raises(ConfigError, match=r"^seed=-1: should be at least 0$"):
        load("mine:tiny")


# -- arguments ---------------------------------------------------------------------------------


class Mode(enum.Enum):
    FAST = "fast"
    SLOW = "slow"


def bind(annotation, *args: str):
    """Return what a function with one parameter ``x`` gets."""

    def function(x): ...

    function.__annotations__ = {"x": annotation}
    return _bind("job", function, args).arguments["x"]


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "3", 3),
        (int, "-3", -3),
        (float, "3", 3.0),
        (float, "1e-3", 1e-3),
        (str, "3", "3"),
        (str, "a=b", "a=b"),
        (str, "a,b", "a,b"),
        (str, "", ""),
        (str, "none", "none"),
        (bool, "true", True),
        (bool, "no", False),
        (bool, "0", False),
        (Path, "a/b", Path("a/b")),
        (Mode, "fast", Mode.FAST),
        (Literal["a", "b"], "b", "b"),
        (Literal[1, 2], "2", 2),
        (int | None, "none", None),
        (int | None, "3", 3),
        (str | None, "null", None),
        (int | str, "3", 3),
        (int | str, "x", "x"),
        (tuple[int, ...], "1,2,3", (1, 2, 3)),
        (tuple[int, ...], "1", (1,)),
        (tuple[int, ...], "", ()),
        (tuple[str, ...], "1,b", ("1", "b")),
        (tuple[float, float], "0.9, 0.99", (0.9, 0.99)),
        (tuple[Literal[1, 2], ...], "1,2", (1, 2)),
        (list[int], "1,2", [1, 2]),
        (Annotated[int, Field(gt=0)], "3", 3),
        ("int | None", "3", 3),
    ],
)
def test_arguments_are_read_by_annotation(annotation, text, value):
    result = bind(annotation, f"x={text}")
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("annotation", "text", "expected"),
    [
        (int, "three", "int"),
        (int, "3.5", "int"),
        (float, "", "float"),
        (bool, "maybe", "bool"),
        (Mode, "medium", "'fast' or 'slow'"),
        (Literal["a", "b", "c"], "d", "'a', 'b' or 'c'"),
        (int | None, "x", "int or none"),
        (tuple[int, ...], "1,x", "tuple[int, ...]"),
        (tuple[int, int], "1", "tuple[int, int]"),
        (Annotated[int, Field(gt=0)], "x", "int"),
        (Annotated[int, Field(gt=0)], "0", "int, greater than 0"),
        (Annotated[float, Field(ge=0, le=1)] | None, "2", "float or none, less than or equal to 1"),
    ],
)
def test_a_wrong_argument_names_parameter_value_and_type(annotation, text, expected):
    with pytest.raises(JobError) as caught:
        bind(annotation, f"x={text}")
    assert str(caught.value) == f"job: --arg x={text!r} should be {expected}"


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.lists(st.integers()))
def test_what_is_written_is_what_is_read(whole, number, flag, several):
    assert bind(int, f"x={whole}") == whole
    assert bind(float, f"x={number!r}") == number
    assert bind(bool, f"x={flag}") is flag
    assert bind(tuple[int, ...], "x=" + ",".join(map(str, several))) == tuple(several)


def test_an_unknown_argument_is_answered_with_types_and_defaults(write):
    write("def tiny(data: str, epochs: float = 3.0, widths: tuple[int, ...] = (1, 2), **rest) -> Job: ...\n")
    valid = "valid: data: str; epochs: float = 3.0; widths: tuple[int, ...] = (1, 2)"
    assert refusal("mine:tiny", "epoch=3") == (
        f"job 'mine:tiny': unknown --arg 'epoch'; did you mean 'epochs'? {valid}"
    )
    assert refusal("mine:tiny", "zzz=3") == f"job 'mine:tiny': unknown --arg 'zzz'; {valid}"
    assert refusal("mine:tiny") == "job 'mine:tiny': needs --arg data=value, str"
    assert refusal("mine:tiny", "data") == "--arg 'data': write it as name=value, as in epochs=3"


def test_a_function_without_parameters(write):
    write("def tiny() -> Job: ...\n")
    assert refusal("mine:tiny", "x=3") == "job 'mine:tiny': unknown --arg 'x'; the function has no parameters"


def test_parameters_of_every_kind(write):
    write(
        "def tiny(a: int, /, b: int, *rest: int, c: int = 3, d=4, e=None, **more) -> Job:\n"
        "    return Job(config(name=f'{a}-{b}-{c}-{d + 1}-{e}-{len(rest)}-{len(more)}'.lower()), Task())\n"
    )
    assert load("mine:tiny", ["a=1", "b=2", "d=5"]).config.name == "1-2-3-6-none-0-0"
    assert load("mine:tiny", ["a=1", "b=2", "e=x", "a=7"]).config.name == "7-2-3-5-x-0-0"


def test_an_annotation_that_text_cannot_fill(write):
    write("class Thing: ...\ndef tiny(thing: Thing = None, other: 'NoSuch' = None) -> Job: ...\n")
    assert "an annotation of its parameters cannot be read: NameError" in refusal("mine:tiny", "thing=3")
    write("class Thing: ...\ndef tiny(thing: Thing = None) -> Job: ...\n", "second.py")
    assert refusal("second:tiny", "thing=3") == ("job 'second:tiny': --arg thing cannot be given as text: it is Thing")


def test_importing_job_imports_no_framework():
    code = "import sys, orchestrator.job; print({'torch', 'numpy', 'ray', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
