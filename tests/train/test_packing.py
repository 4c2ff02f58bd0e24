"""What the packer may never do, whatever it is given."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maxlike.train.packing import Example, choose, pack


@given(st.data())
def test_what_is_chosen_fits_and_nothing_more_would(data):
    room = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, room), max_size=20))
    places = data.draw(st.integers(1, 8))
    taken = choose(lengths, room, places)
    assert taken == sorted(set(taken)) and len(taken) <= places
    used = sum(lengths[i] for i in taken)
    assert used <= room
    if lengths:
        assert taken[0] == 0
    if len(taken) < places:
        assert all(used + n > room for i, n in enumerate(lengths) if i not in taken)


def test_the_longest_that_fit():
    assert choose([3, 4, 6, 1, 5, 4], 12, 9) == [0, 2, 3]  # 3, then 6, then 1 (of 3 left)
    assert choose([3, 2, 2, 2], 7, 9) == [0, 1, 2]
    assert choose([3, 1, 2, 2], 9, 2) == [0, 2]
    assert choose([], 5, 3) == [] == choose([1], 5, 0)


@given(st.data())
def test_every_token_once_and_in_its_place(data):
    R, t, S = data.draw(st.integers(1, 3)), data.draw(st.integers(4, 30)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shards, number = [], 1
    for _ in range(R):
        room, groups = t, []
        for _ in range(data.draw(st.integers(0, S))):
            n = int(rng.integers(1, 9))
            if n <= room:
                room -= n
                groups.append((Example(np.arange(number, number + n, dtype=np.int32),
                                       rng.integers(0, 2, n).astype(np.float32)),))
                number += n
        shards.append(groups)
    batch = pack(shards, t, S)
    assert [x.shape for x in (batch.tokens, batch.targets, batch.weights, batch.row_offsets)] == [
        (R * t,), (R * t,), (R * t,), (R, S + 1)]
    assert [x.dtype for x in (batch.tokens, batch.targets, batch.weights, batch.row_offsets)] == [
        np.int32, np.int32, np.float32, np.int32]
    real = batch.tokens[batch.tokens > 0]
    assert real.tolist() == list(range(1, number))
    for r, groups in enumerate(shards):
        offsets = batch.row_offsets[r]
        assert offsets[0] == 0 and np.all(np.diff(offsets) >= 0) and offsets[-1] <= t
        cut = slice(r * t, (r + 1) * t)
        tokens, targets, weights = batch.tokens[cut], batch.targets[cut], batch.weights[cut]
        for s in range(S):
            a, b = offsets[s], offsets[s + 1]
            if s >= len(groups):
                assert a == b == offsets[-1]
                continue
            [example] = groups[s]
            assert tokens[a:b].tolist() == example.tokens.tolist()
            assert targets[a:b].tolist() == [*example.tokens[1:], 0]
            assert weights[a:b].tolist() == [*example.weights[1:], 0]
        assert not tokens[offsets[-1]:].any() and not targets[offsets[-1]:].any() and not weights[offsets[-1]:].any()
