"""Files to batches: every record once in an epoch, the same batches after a resume, for any number of processes."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxlike.train.data import DataConfig, load_dataset
from maxlike.train.stream import merge_states
from tests.train.corpora import say, tokenizer_of, write_lines

N = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{i} " + "word " * int(rng.integers(1, 40)) for i in range(N)]
    return write_lines(folder / "texts.jsonl", ({"text": text} for text in texts))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("pairs")
    return write_lines(folder / "pairs.jsonl", (
        {"prompt": say(f"{i} ?"), "chosen": [{"role": "assistant", "content": "yes " * int(rng.integers(1, 9))}],
         "rejected": [{"role": "assistant", "content": "no " * int(rng.integers(1, 9))}]} for i in range(20)))


def config(file, **changes):
    return DataConfig(**{"train_files": str(file), "tokens_per_batch": 128, "max_seq_len": 24, "max_seqs": 5,
                         "lookahead": 6, "threads": 2, **changes})


def sequences(batches):
    """Every sequence, as tokens, with the shape checked on the way."""
    found = []
    for batch in batches:
        t = len(batch.tokens) // len(batch.row_offsets)
        for r, offsets in enumerate(batch.row_offsets):
            found += [tuple(batch.tokens[r * t + a : r * t + b].tolist())
                      for a, b in itertools.pairwise(offsets) if b > a]
    return found


def expected_windows(file, tokenizer, limit=24):
    windows = Counter()
    for line in file.read_text().splitlines():
        ids = [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]
        windows.update([tuple(ids)] if len(ids) <= limit else
                       [tuple(ids[i : i + limit]) for i in range(0, len(ids) - 1, limit - 1)])
    return windows


def take(stream, n):
    return [next(stream) for _ in range(n)]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for left, right in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
            assert left.dtype == right.dtype and np.array_equal(left, right)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_window_once_in_an_epoch(tokenizer, file, shards, epochs):
    dataset, validation = load_dataset(config(file, shards=shards, epochs=epochs), tokenizer)
    stream = iter(dataset)
    batches = list(stream)
    assert validation is None and dataset.records == N and not dataset.preference
    assert Counter(sequences(batches)) == Counter(
        {window: n * epochs for window, n in expected_windows(file, tokenizer).items()})
    assert all(batch.tokens.shape == (128,) and batch.row_offsets.shape == (shards, 6) for batch in batches)
    summary = stream.summary()
    assert (summary.records, summary.batches, summary.slots) == (N, len(batches), 128 * len(batches))
    assert summary.tokens == sum(map(len, sequences(batches)))
    assert summary.learned == sum(int(batch.weights.sum()) for batch in batches)
    assert summary.efficiency == summary.tokens / summary.slots
    assert dataset.count_batches() == len(batches)
    assert summary.sequences == expected_windows(file, tokenizer).total()
    with pytest.raises(StopIteration):
        next(stream)


def test_little_is_padding(tokenizer, file):
    dataset, _ = load_dataset(config(file, max_seqs=None, max_seq_len=64, lookahead=64, epochs=10), tokenizer)
    assert dataset.measure().efficiency > 0.97


def test_the_order_is_another_in_every_epoch_and_for_every_seed(tokenizer, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ({"text": f"{i:02}"} for i in range(40)))

    def order(**changes):
        dataset, _ = load_dataset(config(file, lookahead=1, tokens_per_batch=24, **changes), tokenizer)
        return [tokenizer.decode(ids) for ids in sequences(list(dataset))]

    plain = [f"{i:02}" for i in range(40)]
    assert order(shuffle=False, epochs=2) == plain * 2
    two = order(epochs=2)
    assert sorted(two[:40]) == sorted(two[40:]) == plain
    orders = [plain, two[:40], two[40:], order(seed=1)]
    assert len({tuple(x) for x in orders}) == 4
    # Neighbouring seeds share no epoch.
    assert order(seed=1) != two[40:] and order(epochs=2) == two


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    """Eight texts, each of one letter: a window tells which text it is of."""
    return write_lines(tmp_path_factory.mktemp("long") / "long.jsonl", ({"text": 600 * x} for x in "bjkqvxyz"))


def test_a_shuffle_buffer_parts_the_windows_of_a_text(tokenizer, long_texts):
    def windows(**changes):
        dataset, _ = load_dataset(config(long_texts, lookahead=2, **changes), tokenizer)
        return sequences(list(dataset))

    def neighbours(found):
        """How often a window is followed by one of the same text, told by a token in its middle."""
        return sum(a[len(a) // 2] == b[len(b) // 2] for a, b in itertools.pairwise(found)) / len(found)

    apart, mixed = windows(), windows(shuffle_buffer=100)
    assert Counter(apart) == Counter(mixed) == expected_windows(long_texts, tokenizer)
    assert neighbours(apart) > 0.85
    assert neighbours(mixed) < 0.4  # 1 in 8 were all of them mixed
    assert mixed == windows(shuffle_buffer=100)
    assert mixed != windows(shuffle_buffer=100, seed=1)


def test_drawn_windows_differ_between_epochs_and_hold_every_token_once(tokenizer, long_texts):
    def windows(epochs):
        dataset, _ = load_dataset(config(long_texts, window_lengths=[6, 6, 24], epochs=epochs), tokenizer)
        return sequences(list(dataset))

    first, both = Counter(windows(1)), Counter(windows(2))
    assert not first - both and first != both - first
    sizes = Counter(map(len, windows(20)))
    assert max(sizes) == 24 and min(sizes) == 2
    # Two in three texts are cut to windows of 6, into more by (24 - 1) / (6 - 1).
    assert 0.6 < sizes[6] / sizes[24] / (2 * 23 / 5) < 1.6
    for epochs, found in ((1, first), (2, both)):
        targets = Counter(token for window, n in found.items() for token in window[1:] * n)
        assert targets == Counter(token for window, n in expected_windows(long_texts, tokenizer).items()
                                  for token in window[1:] * n * epochs)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 12), again=st.integers(0, 3), shards=st.sampled_from([1, 2, 4]),
       order=st.sampled_from([{"shuffle": False}, {}, {"shuffle_buffer": 9, "window_lengths": [9, 20]}]),
       threads=st.integers(1, 4))
def test_a_resumed_stream_gives_what_an_unbroken_one_does(tokenizer, file, cut, again, shards, order, threads):
    dataset, _ = load_dataset(config(file, shards=shards, epochs=None, threads=threads, **order), tokenizer)
    unbroken = iter(dataset)
    first = take(unbroken, cut)
    state = json.loads(json.dumps(unbroken.get_state()))
    rest = take(unbroken, 8)  # beyond the end of an epoch at the later cuts
    resumed = iter(load_dataset(config(file, shards=shards, epochs=None, **order), tokenizer)[0])
    same(take(resumed, again), (first + rest)[:again])  # it may have been used before
    resumed.set_state(state)
    assert resumed.get_state()["summary"] == state["summary"]
    middle = take(resumed, 3)
    second = iter(dataset)
    second.set_state(json.loads(json.dumps(resumed.get_state())))
    same(middle + take(second, 5), rest)
    assert second.summary() == unbroken.summary()
    for stream in (unbroken, resumed, second):
        stream.close()


@pytest.mark.parametrize("processes", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3], [0, 1, 2, 3]]])
def test_any_number_of_processes_makes_the_same_batches(tokenizer, file, processes):
    settings = config(file, shards=4)
    whole = list(load_dataset(settings, tokenizer)[0])
    parts = [load_dataset(settings, tokenizer, own_shards=own)[0] for own in processes]
    for part, own in zip(parts, processes, strict=True):
        if len(own) < 4:
            with pytest.raises(ValueError, match="with_length"):
                iter(part)
    length = max(part.count_batches() for part in parts)
    assert length == len(whole)
    streams = [iter(part.with_length(length)) for part in parts]
    got = [list(stream) for stream in streams]
    for part, own in zip(got, processes, strict=True):
        assert len(part) == length  # equal numbers, though shards end at different batches
        for batch, full in zip(part, whole, strict=True):
            for name in ("tokens", "targets", "weights", "row_offsets"):
                rows = getattr(full, name).reshape(4, -1)[own]
                assert np.array_equal(getattr(batch, name).reshape(len(own), -1), rows)


def test_a_run_goes_on_with_another_number_of_processes(tokenizer, file):
    settings = config(file, shards=4, epochs=None)
    whole = iter(load_dataset(settings, tokenizer)[0])
    expected = take(whole, 9)[5:]
    two = [iter(load_dataset(settings, tokenizer, own_shards=own)[0]) for own in ([0, 1], [2, 3])]
    for stream in two:
        take(stream, 5)
    states = [stream.get_state() for stream in two]
    merged = json.loads(json.dumps(merge_states(states)))
    one = iter(load_dataset(settings, tokenizer)[0])
    with pytest.raises(ValueError, match=r"says nothing of shards \[2, 3\].*merge_states"):
        one.set_state(states[0])
    one.set_state(merged)
    same(take(one, 4), expected)
    assert one.summary().tokens == whole.summary().tokens and one.summary().records == whole.summary().records
    assert merge_states([states[0], states[0], states[1]]) == merge_states(states)
    next(two[0])
    with pytest.raises(ValueError, match="not of one step"):
        merge_states([two[0].get_state(), states[1]])


@pytest.mark.parametrize("before", [(1, 128), (4, 128), (2, 256)])
@pytest.mark.parametrize("after", [(1, 64), (2, 128), (4, 256), (5, 160)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_another_number_of_shards_loses_no_record_and_repeats_none(tokenizer, file, before, after, steps):
    old = iter(load_dataset(config(file, shards=before[0], tokens_per_batch=before[1], shuffle_buffer=5),
                            tokenizer)[0])
    first = take(old, steps)
    new = iter(load_dataset(config(file, shards=after[0], tokens_per_batch=after[1]), tokenizer)[0])
    new.set_state(old.get_state())
    second = take(new, 1)
    again = iter(load_dataset(config(file, shards=after[0], tokens_per_batch=after[1]), tokenizer)[0])
    again.set_state(new.get_state())
    assert Counter(sequences([*first, *second, *again])) == expected_windows(file, tokenizer)
    assert again.summary().records == N


def test_a_state_of_other_data_is_refused(tokenizer, file, tmp_path):
    stream = iter(load_dataset(config(file), tokenizer)[0])
    take(stream, 2)
    state = stream.get_state()
    fewer = write_lines(tmp_path / "a.jsonl", [{"text": "a"}] * 5)
    for changed, says in ((config(file, seed=3), "seed was 0 and is 3"), (config(fewer), "records was 60 and is 5"),
                          (config(file, max_seq_len=20), "max_seq_len was 24 and is 20")):
        with pytest.raises(ValueError, match=says):
            iter(load_dataset(changed, tokenizer)[0]).set_state(state)
    lines = file.read_text().splitlines(keepends=True)
    other = tmp_path / "b.jsonl"
    other.write_text("".join('{"text": "a"}'.ljust(len(line) - 1) + "\n" for line in lines))  # as many bytes
    with pytest.raises(ValueError, match="does not fit the data"):
        iter(load_dataset(config(other), tokenizer)[0]).set_state(
            {**state, "places": {"0": {**state["places"]["0"], "waiting": [0], "waiting_pieces": [3]}}})


def test_pairs_stay_together(tokenizer, pairs):
    dataset, _ = load_dataset(config(pairs, shards=2, tokens_per_batch=256, max_seq_len=None), tokenizer)
    batches = list(dataset)
    assert dataset.preference and batches[0].row_offsets.shape == (2, 7)  # S is made even
    found = []
    for batch in batches:
        for r, offsets in enumerate(batch.row_offsets):
            lengths = np.diff(offsets)
            for i in range(0, 6, 2):
                assert (lengths[i] == 0) == (lengths[i + 1] == 0)
                if lengths[i] == 0:
                    continue
                sides = [slice(r * 128 + offsets[s], r * 128 + offsets[s + 1]) for s in (i, i + 1)]
                chosen, rejected = (tokenizer.decode(batch.tokens[side]) for side in sides)
                assert "yes" in chosen and "no" in rejected
                number = [int(text.split("user\n")[1].split()[0]) for text in (chosen, rejected)]
                assert number[0] == number[1]
                found.append(number[0])
                learned = batch.targets[sides[0]][batch.weights[sides[0]] > 0]
                assert tokenizer.decode(learned).split() == ["yes"] * (len(chosen.split("yes")) - 1)
    assert sorted(found) == list(range(20))


BAD = ['{"text": "good"}', '{"text"', '["a"]', '{"text": ""}', '{"text": "also good"}', '{"messages": []}']


def test_bad_data_is_refused_by_file_and_line(tokenizer, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(BAD))
    stream = iter(load_dataset(config(file, shuffle=False), tokenizer)[0])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON.*on_bad_data 'skip' leaves"):
        list(stream)
    file.write_text("\n".join(BAD[1:]))
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: not JSON"):
        load_dataset(config(file), tokenizer)


@pytest.mark.parametrize("shards", [1, 2])
def test_bad_data_is_skipped_and_counted_once(tokenizer, tmp_path, shards):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(BAD))
    dataset, _ = load_dataset(config(file, shards=shards, on_bad_data="skip", epochs=3, shuffle=False), tokenizer)
    stream = iter(dataset)
    texts = Counter(tokenizer.decode(ids) for ids in sequences(list(stream)))
    assert texts == {"good": 3, "also good": 3}
    summary = stream.summary()
    assert summary.bad == {"not_json": 1, "not_an_object": 1, "empty": 2} and summary.records == 6
    assert {message.split(": ")[0] for message in summary.messages} == {f"{file}, line {i}" for i in (2, 3, 4, 6)}


def test_nothing_but_bad_data(tokenizer, tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", [{"text": ""}] * 5)
    dataset, _ = load_dataset(config(file, on_bad_data="skip", epochs=None), tokenizer)
    with pytest.raises(ValueError, match=r"found none to learn from in 6 records; the last one: .*text is empty"):
        next(iter(dataset))
    dataset, _ = load_dataset(config(file, on_bad_data="skip", epochs=2), tokenizer)
    with pytest.raises(ValueError, match=r"none of 5 records can be learned from; the first: .*line \d: text is empty"):
        next(iter(dataset))
    file = write_lines(tmp_path / "worse.jsonl", [3] * 5)
    with pytest.raises(ValueError, match=r"worse\.jsonl, line 1: expected a JSON object"):
        load_dataset(config(file, on_bad_data="skip"), tokenizer)
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": say("a", "b")}])
    bare = tokenizer_of(tmp_path / "bare", None)
    with pytest.raises(ValueError, match="no chat template"):
        next(iter(load_dataset(config(chats, on_bad_data="skip"), bare)[0]))


def test_validation(tokenizer, file, tmp_path):
    train, held = load_dataset(config(file, validation_fraction=0.2, epochs=None), tokenizer)
    assert train.records + held.records == N and held.records > 3
    one, two = list(held), list(held)
    same(one, two)
    assert len(one) == held.count_batches()
    everything, found = set(expected_windows(file, tokenizer)), set(sequences(one))
    learned = set(sequences(take(iter(train), 30)))
    assert learned | found == everything
    assert not any(window[0] == tokenizer.bos_token_id for window in learned & found)  # later windows may be alike

    other = write_lines(tmp_path / "b.jsonl", ({"text": f"{i}"} for i in range(9)))
    train, held = load_dataset(config(file, validation_files=[str(other)], epochs=2), tokenizer)
    assert train.records == N and [tokenizer.decode(ids) for ids in sequences(held)] == [str(i) for i in range(9)]
    with pytest.raises(ValueError, match="never end"):
        load_dataset(config(file, epochs=None), tokenizer)[0].count_batches()


@pytest.mark.parametrize(("changes", "says"), [
    ({"train_files": ()}, "train_files is empty"),
    ({"format": "csv"}, "format must be one of auto, text"),
    ({"on_bad_data": "ignore"}, "on_bad_data must be one of refuse, skip"),
    ({"shards": 3}, "cannot be cut into 3 shards"),
    ({"shards": 8}, "max_seq_len 24 is more than the 16 tokens of a shard"),
    ({"epochs": 0}, "epochs must be a whole number of at least 1"),
    ({"epochs": True}, "epochs must be a whole number"),
    ({"max_seqs": 1.5}, "max_seqs must be a whole number"),
    ({"validation_files": "a", "validation_fraction": 0.1}, "give one of them"),
    ({"shuffle_buffer": -1}, "shuffle_buffer must be a whole number of at least 0"),
    ({"shuffle_buffer": 8, "shuffle": False}, "shuffle_buffer is 8, but without shuffle"),
    ({"window_lengths": [25]}, "window_lengths must be from 2 to max_seq_len, here 24"),
    ({"window_lengths": [1, 8]}, "window_lengths must be from 2"),
    ({"window_lengths": [8], "long_text": "bad"}, "long_text 'cut'; got"),
])
def test_settings_out_of_range(file, changes, says):
    with pytest.raises(ValueError, match=says):
        config(file, **changes)


def test_shards_that_are_not_there(tokenizer, file):
    for own in ([], [4], [0, 0]):
        with pytest.raises(ValueError, match="own_shards must be some of 0 to 3"):
            load_dataset(config(file, shards=4), tokenizer, own_shards=own)


def test_an_open_stream_ends_with_the_program(file):
    program = """
import sys
from maxlike.train.data import DataConfig, load_dataset
from tests.train.corpora import tokenizer_of
from pathlib import Path
tokenizer = tokenizer_of(Path(sys.argv[1]).parent / "tokenizer")
dataset, _ = load_dataset(DataConfig([sys.argv[1]], 64, epochs=None), tokenizer)
streams = [iter(dataset), iter(dataset)]
print(sum(int(next(stream).tokens[0]) for stream in streams))
"""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-W", "error", "-c", program, str(file)], capture_output=True, text=True,
                         env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "2\n", "")


def test_a_closed_stream_says_so(tokenizer, file):
    stream = iter(load_dataset(config(file), tokenizer)[0])
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_batches_are_pytrees(tokenizer, file):
    batch = next(iter(load_dataset(config(file), tokenizer)[0]))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), batch, batch)
    assert stacked.tokens.shape == (2, 128) and type(stacked) is type(batch)
    assert jax.jit(lambda b: b.weights.sum())(batch) == batch.weights.sum()
