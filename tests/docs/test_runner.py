"""The runner of snippets sees what it should: what does not run, is of no known kind, or prints something else."""

import re

import pytest

from tests.docs import pages, toys, workplace
from tests.docs.pages import Block, blocks
from tests.docs.running import Page, compare
from tests.docs.shell import Command, commands
from tests.docs.unrun import NOT_RUN, PROJECT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a page of this text."""
    monkeypatch.chdir(tmp_path)

    def run(text):
        monkeypatch.setitem(pages.PAGES, "page.md", text)
        page = Page("page.md", tmp_path)
        page.run()
        return page

    return run


def bash(text, language="bash"):
    return Block("page.md", language, 1, text)


def words(text, language="bash"):
    return [command.words for command in commands(bash(text, language))]


class TestBlocks:
    def test_are_found_in_lists_and_directives_with_their_lines(self):
        text = "- a\n  ```python\n  x = 1\n  ```\n\n````{tab-set}\n```bash\nls\n```\n````\n~~~yaml\na: 1\n~~~\n"
        found = [(block.language, block.line, block.text, block.above) for block in blocks("page.md", text=text)]
        assert [block[:3] for block in found] == [("python", 3, "x = 1\n"), ("bash", 8, "ls\n"), ("yaml", 12, "a: 1\n")]
        assert [block[3] for block in found[1:]] == [2, 1]

    def test_without_language_or_end_are_refused(self):
        with pytest.raises(AssertionError, match=r"page.md:2: a block without its language"):
            blocks("page.md", text="a\n```\nls\n```\n")
        with pytest.raises(AssertionError, match="no end"):
            blocks("page.md", text="```python\nx\n")


class TestCommands:
    def test_are_taken_apart(self):
        text = '# said\npip install ".[test]" && ls  # both\nA=1 lightning-igpt fit --x "a; b" \\\n  --y+=c\n'
        assert words(text) == [
            ["pip", "install", ".[test]"],
            ["ls"],
            ["lightning-igpt", "fit", "--x", "a; b", "--y+=c"],
        ]
        assert [command.environment for command in commands(bash(text))][-1] == {"A": "1"}
        assert words("$ ls a\nb\n$ ls c\n", "console") == [["ls", "a"], ["ls", "c"]]
        (command,) = commands(bash("lightning-igpt plan > plan.txt  # exit status 1"))
        assert (command.output_file, command.status) == ("plan.txt", 1)

    @pytest.mark.parametrize("line", ["ls | wc", "cat <<EOF", "(ls)", "ls &"])
    def test_that_are_not_understood_are_refused(self, line):
        with pytest.raises(AssertionError, match=r"page.md:1: .* is not understood"):
            words(line)


class TestPages:
    def test_share_a_folder_and_a_namespace(self, run):
        shell = "```bash\ncat made/a.py > b\npython made/a.py\n```\n"
        run(f"```python\n# made/a.py\nx = 1\n```\n{shell}```python\nopen('b').close(); x\n```\n")

    def test_name_page_line_command_and_output_of_what_fails(self, run):
        with pytest.raises(
            AssertionError, match=r"(?s)page.md:3: status 1, not 0, of\n  lightning-igpt recipes show no\n.*'no'"
        ):
            run("a\n```bash\nlightning-igpt recipes show no\n```\n")
        run("```bash\nlightning-igpt recipes show no  # exit status 1\n```\n")

    @pytest.mark.parametrize("line", ["curl https://host/x", "make it", "python no.py", "python -m nothing"])
    def test_lines_of_an_unknown_kind_fail(self, run, line):
        with pytest.raises(AssertionError, match=r"^page\.md:2"):
            run(f"```bash\n{line}\n```\n")

    @pytest.mark.parametrize(
        "line",
        [
            "pip install ./no.zip",
            "pip install numpyy",
            "sbatch no.sh",
            "tensorboard --logdir .",
            "source venv/bin/activate",
        ],
    )
    def test_lines_that_are_not_run_are_checked(self, run, line):
        with pytest.raises(AssertionError, match=re.escape(line)):
            run(f"```bash\n{line}\n```\n")

    def test_show_what_is_printed(self, run):
        list_recipes = "```bash\nlightning-igpt recipes list\n```\n"
        run(f"{list_recipes}```text\ncifar10_s_finetune ...\n...\nimagenet64_xl_pretrain\n```\n")
        with pytest.raises(AssertionError, match="which is not so printed"):
            run(f"{list_recipes}```text\ncifar10_s\nnothing of the kind\n```\n")

    def test_numbers_are_compared_where_they_are_the_same_everywhere(self):
        compare(bash("took 3.1 s, 1,000 images\n", "text"), "it took  12 s, 20 images", exact=False)
        with pytest.raises(AssertionError):
            compare(bash("took 3.1 s\n", "text"), "took 3.2 s", exact=True)


class TestToys:
    def test_recipes_keep_what_they_say_of_data_and_colours(self):
        recipe = {"model": {"init_args": {"network": "igpt_s", "palette": "gray:16", "lr": 1.0, "warmup_steps": 500}}}
        recipe |= {"data": {"init_args": {"source": "x", "batch_size": 128}}, "trainer": {"max_steps": 9999}}
        small = toys.small_recipe(recipe)
        network = toys.BLOCKS | {"image_size": 32, "vocab_size": 16, "objective": "autoregressive"}
        assert small["model"]["init_args"] == {"network": network, "palette": "gray:16", "lr": 1.0, "warmup_steps": 1}
        assert small["data"]["init_args"] == {"source": "x", "batch_size": 4, "num_workers": 0}
        assert small["trainer"] == {"max_steps": 2}

    def test_large_numbers_of_a_command_become_small_and_others_stay(self, tmp_path):
        given = ["fit", "--config", "digits_tiny_pretrain", "--trainer.max_steps=500", "--model.init_args.lr", "0.1"]
        small = toys.small_words(given, tmp_path)
        assert small[1:7] == [
            "--config",
            f"{tmp_path}/digits_tiny_pretrain.yaml",
            "--trainer.max_steps",
            "2",
            *given[-2:],
        ]
        assert toys.small_words(["plan", "--steps", "1000000"], tmp_path) == ["plan", "--steps", "1000000"]

    def test_stand_ins_are_not_for_what_the_line_writes(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        workplace.bring("lightning-igpt fit --trainer.default_root_dir runs/mine && convert x --out mask.png")
        assert not list(tmp_path.iterdir())
        workplace.bring("--mask mask.png")
        assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


def test_every_reason_not_to_run_is_given():
    assert all(reason and callable(check) for reason, check in NOT_RUN.values())
    assert "[project.optional-dependencies]" in PROJECT
    assert not Command("page.md:1", ["lightning-igpt", "fit", "--help"]).heavy
