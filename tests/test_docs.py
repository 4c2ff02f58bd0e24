"""The docstrings tell what a user needs: pages of them build without a warning, lead somewhere, and have every name.

What can be read in the source is: whoever takes or returns arrays gives shapes, who raises says so, and a name between
backticks is one.
"""

import ast
import builtins
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import maxlike.models
import maxlike.nn.transformer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "build_docs.py"

# The names that users of MAX's distributed_transformer look for, and what they call the parameters.
TRANSFORMER = {
    "DistributedTransformer": "dim n_heads layers norm output embedding kv_params kv_collection_constructor devices "
                              "rope return_logits use_subgraphs subgraph_layer_groups",
    "DistributedTransformerBlock": "attention mlp attention_norm mlp_norm devices distributed_gemm_config",
    "ShardableCallable": None,
    "distribute_value": "v devices",
    "forward_sharded_layers": "layers xs",
    "take": "it n",
}
PUBLIC = {
    "maxlike": maxlike.__all__,
    "maxlike.nn": [*maxlike.nn.__all__, "AttentionWithRope.__call__", "MLP.__call__", "RMSNorm.__call__"],
    "maxlike.nn.transformer": [*maxlike.nn.transformer.__all__, *TRANSFORMER, "DistributedTransformer.__call__",
                               "DistributedTransformer.hidden_states"],
    "maxlike.nn.kv_cache": ["KVCacheParams", "KVCacheStrategy", "PagedKVCacheCollection",
                            "ContinuousBatchingKVCacheCollection", "FetchPagedKVCacheCollection",
                            "FetchContinuousBatchingKVCacheCollection", "calibrate"],
    "maxlike.models": maxlike.models.__all__,
    "maxlike.kernels.paged_attention": ["ragged_paged_attention", "Xla", "MosaicTpu", "MosaicGpu"],
    "maxlike.kernels.ragged_attention": ["ragged_attention"],
    "maxlike.engine.config": ["EngineConfig"],
    "maxlike.engine.loading": ["load_engine"],
    "maxlike.engine.engine": ["Engine.add", "Engine.step", "Engine.update_weights"],
    "maxlike.serve.config": ["ServeConfig"],
    "maxlike.train.config": ["TrainConfig"],
    "maxlike.train.loop": ["train"],
    "maxlike.train.export": ["export"],
    "maxlike.train.data": ["DataConfig", "load_dataset"],
    "maxlike.train.step": ["StepConfig", "init_state", "make_train_step", "make_eval_step", "place_batch", "model_of"],
    "maxlike.train.optimizer": ["OptimizerConfig", "make_optimizer"],
}
"""Page -> names on it."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages. Building ends with an error at the first warning, and at links that lead nowhere."""
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("docs")
    run = subprocess.run([sys.executable, SCRIPT, folder], env=os.environ | {"JAX_PLATFORMS": "cpu"},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


class Texts(HTMLParser):
    """The docstring of each anchor of a page: what stands in blocks of class `docstring` behind it."""

    def __init__(self, html: str):
        super().__init__()
        self.found: dict[str, str] = {}
        self._anchor, self._depth = "", 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if self._depth:
            self._depth += tag == "div"
        elif tag in ("section", "div") and given.get("id"):
            self._anchor = given["id"] or ""
        elif tag == "div" and "docstring" in (given.get("class") or ""):
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        if self._depth and tag == "div":
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.found[self._anchor] = self.found.get(self._anchor, "") + data


def test_every_public_name_has_its_place(pages: Path) -> None:
    untold = []
    for module, names in PUBLIC.items():
        texts = Texts((pages / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")).found
        untold += [f"{module}.{name}" for name in names if len(texts.get(name, "").strip()) < 10]
    assert not untold
    files = {file.relative_to(pages).with_suffix("") for file in pages.rglob("*.html")}
    sources = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "maxlike").rglob("*.py")]
    modules = {file.parent if file.name == "__init__" else file for file in sources if file.name != "__main__"}
    assert files == {*modules, Path("index")}


def test_broken_links_are_found(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_docs", SCRIPT)
    assert spec is not None and spec.loader is not None
    build_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_docs)
    (tmp_path / "index.html").write_text('<meta http-equiv="refresh" content="0; url=./a.html"/>')
    (tmp_path / "a.html").write_text(
        '<meta charset="utf-8"><a href="#here">x</a> <a href="b.html#there">y</a> <a href="b.html#C">z</a>'
        '<p id="here"><code>maxlike.gone.away</code> <a href="b.html"><code>maxlike.b</code></a> <code>x</code>'
        '<a href="https://example.com/nowhere">w</a> <a href="../c.html">v</a>')
    (tmp_path / "b.html").write_text('<section id="C"></section>')
    (tmp_path / "lost.html").write_text("")
    assert sorted(build_docs.broken_links(tmp_path)) == [
        "a.html: ../c.html leads to no page",
        "a.html: `maxlike.gone.away` names nothing that has a page",
        "a.html: b.html#there leads to nothing on that page",
        "lost.html: no path leads here from index.html",
    ]


@pytest.mark.parametrize(("name", "parameters"), TRANSFORMER.items())
def test_names_of_the_transformer(name: str, parameters: str | None) -> None:
    found = getattr(importlib.import_module("maxlike.nn.transformer.distributed_transformer"), name)
    function = found.__init__ if inspect.isclass(found) else found
    if parameters is not None:
        assert " ".join(inspect.signature(function).parameters).removeprefix("self ") == parameters


def sources() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted((ROOT / "maxlike").rglob("*.py")):
        yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def functions_of(node: ast.Module | ast.ClassDef, path: str = "", of_class: str = "") -> Iterator[
        tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """(dotted name, function, its docstring and its class's) of the public ones."""
    for part in node.body:
        if isinstance(part, ast.ClassDef) and not part.name.startswith("_"):
            yield from functions_of(part, f"{path}{part.name}.", ast.get_docstring(part) or "")
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and (
                not part.name.startswith("_") or part.name in ("__init__", "__call__")):
            yield path + part.name, part, f"{ast.get_docstring(part) or ''}\n{of_class}"


SHAPE = re.compile(r"\[[\w.][^\]]*\]|\bshapes?\b|\bscalar\b|-> float32|\bpytree\b")
"""`float32[T, D]`; or words for what has any, or none."""


def test_who_takes_arrays_gives_shapes() -> None:
    untold = []
    for file, module in sources():
        for name, function, doc in functions_of(module):
            args = function.args
            kinds = [a.annotation for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)] + [function.returns]
            arrays = any(re.search(r"jax\.Array|np\.ndarray", ast.unparse(kind)) for kind in kinds if kind is not None)
            if arrays and not SHAPE.search(doc):
                untold.append(f"{file}: {name}")
    assert not untold


def test_who_raises_says_so() -> None:
    untold = []
    for file, module in sources():
        for name, function, doc in functions_of(module):
            raised = {re.match(r"[\w.]+", ast.unparse(node.exc))[0]  # type: ignore[index]
                      for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None}
            # A subclass's name may stand for it, and `raise` alone goes on with what came.
            errors = {error for error in raised if error.rpartition(".")[2].endswith(("Error", "Exception"))}
            if errors - {"AttributeError", "NotImplementedError"} and not re.search(r"[Rr]aise|\w+Error", doc):
                untold.append(f"{file}: {name} raises {', '.join(sorted(errors))}")
    assert not untold


# Names of other programs' or of files, and words of a docstring's own.
OTHERS = {"AbstractDevice", "aclose", "enable_thinking", "family.py", "kv_pages", "last_logits",
          "self_attn.attn.k_scale"}


def test_names_in_docstrings_exist() -> None:
    known, docs = set(dir(builtins)), []
    for file, module in sources():
        known.add(Path(file).stem)
        for node in ast.walk(module):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    known.add(name)
                    docs.append((file, name, ast.get_docstring(node) or ""))
                case ast.Module():
                    docs.append((file, "", ast.get_docstring(node) or ""))
                case ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Name(id=name) | ast.Attribute(attr=name):
                    known.add(name)
                case ast.alias(name=name, asname=asname):
                    known.update((asname or name).split("."))
                case ast.Constant(value=str(text)) if len(text) < 60:
                    known.update(re.findall(r"\w+", text))  # names in a protocol, of fields, of parameters
    gone = [f"{file}: {name}: `{quoted}`" for file, name, doc in docs
            for quoted in re.findall(r"(?<!`)`([A-Za-z_]\w+(?:\.\w+)*(?:\(\))?)`(?!`)", doc)
            if quoted not in OTHERS and not set(quoted.removesuffix("()").split(".")) <= known]
    assert not gone
