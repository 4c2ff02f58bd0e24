"""Ragged paged attention for Hopper GPUs (sm_90a), in Pallas Mosaic GPU.

Two floors. Decoding, every byte of K and V is read once: 3.35 TB/s on an H100, 4.8 on an H200, against G
operations a byte in bfloat16 for groups of G query heads. Products have 64 rows, whatever G is: that costs nothing yet,
since 64 operations a byte are a fifth of what the tensor cores do in that time. Prefilling, 4 * H operations for each
query head and pair of positions, at 989 TFLOP/s; and for each such pair an exp2, of which a multiprocessor does 16 a
cycle. At head width 128 a block's exp2 take half as long as its products, and hide behind another warpgroup's.

Who does what. A thread block has two warpgroups that multiply (workers), and one that does nothing but copy blocks of K
and V from the pages to a ring in shared memory (TMA), as far ahead as the ring is long. Barriers of the ring's places
are all that ties them: `loaded` when a block has come, `free` when its readers are done. The fetching warpgroup reads
the page table one block ahead of its copies, so that they do not wait for it. Pages that neither the causal mask nor
the window lets a thread block see are never fetched; in a block that is only partly seen, copies that nobody needs
repeat a page that is needed, so that no wild entry of the table is followed. The slots that do not count are then
hidden in the scores, and their values set to zero in shared memory: they may hold NaN, which zero weights do not hide.
  decode   a row of the product is a query head of the group, up to 64. What a sequence sees is cut into items, so that
           all multiprocessors have work to the end; workers take the blocks of an item in turn, each with a softmax of
           its own. `_combine` joins them in XLA, as one product with a matrix of ones and zeros: it reads them once
           and always sums in one order, which atomics would not.
  prefill  a row is a token. The workers have two heads of the group and the same 64 tokens; where the group is odd,
           one head and 64 tokens each. They share each block. Tiles that end within 64 rows store theirs row by row.
A chunk of few tokens after a long cache is not cut along the cache: it fills only N / 2 thread blocks for 64 tokens.

The cache's layout suits both: K and V of a page and head are consecutive, so one copy brings page_size slots, K as the
transposed and V as the plain second operand of wgmma, in the swizzle that wgmma wants and TMA makes. The step's K and V
are written before, by an XLA scatter: it is in place in a donated cache (compiled for an H100 there is no copy of the
cache), and one fused kernel with what joins K and V. A write inside the kernels would have to come before the reads of
other thread blocks, which have no order; as it is they only read.

8-bit caches are widened by the workers from the ring to a second buffer, int8 to bfloat16 and float8_e4m3fn to float16,
both exactly; scales meet scores and outputs in float32. float32 is refused: the tensor cores multiply it as tfloat32,
of 11 bits. CUDA 12.8 to 12.9.0 has a ptxas known to miscompile causal masks in this kind of kernel; use 12.9.1 or 13.

KiB of shared memory (of 227) as q + staged outputs + widened blocks + stages, for a cache of 16 and one of 8 bits, and
the registers of a worker's thread (of 232) as outputs + scores + weights:

  head width       64                  80                  96                  128                 256
  decode, 16 bit   8+33+0+8*16         10+41+0+8*20        12+49+0+6*24        16+33+0+5*32        32+33+0+2*64
  decode, 8 bit    8+33+32+8*8         10+41+40+8*10       12+49+48+8*12       16+33+64+6*16       32+17+64+3*32
  registers        32+32+16            40+32+16            48+32+16            64+32+16            128+32+16
  prefill, 16 bit  16+16+0+6*32        20+32+0+8*20        24+32+0+7*24        32+32+0+5*32        64+16+0+2*64
  prefill, 8 bit   16+16+64+8*16       20+32+40+8*10       24+32+48+8*12       32+32+64+6*16       32+8+64+3*32
  registers        32+64+32            40+32+16            48+32+16            64+32+16            128+32+16

At width 256 an 8-bit cache leaves room for one worker. Compiled for an H100 by ptxas 13.5 nothing is spilled, but up to
200 bytes at the widths 192 and 256 with an 8-bit cache. Nothing here has been timed on a GPU yet.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from maxlike.kernels.paged_attention import xla

OLDEST_JAX = "0.11.2"
ROWS = 64  # of a warpgroup's matrix product
WAVES = 4  # thread blocks that a multiprocessor runs one after the other, at most, where it is cutting that makes them
START = 2  # what starting a thread block costs, in blocks of K and V read: about 2 microseconds (estimated)
SHARED_MEMORY = 224 * 1024  # bytes to plan with: the 227 KiB of a thread block, less what reductions and barriers take
MAX_STAGES = 8
NO_SCORE = -1e30  # finite: a row that has no score yet then gives exp2(0), wiped out by its first real score
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class MosaicGpu:
    """Ragged paged attention on a Hopper GPU. The fields override what it chooses.

    multiprocessors: of the GPU; decoding is cut so that all have work.
    stages: blocks of K and V in shared memory at a time; None: as many as fit, at most 8.
    interpret: `plgpu.InterpretGPUParams()` runs the kernels on CPU.
    """

    multiprocessors: int = 132
    stages: int | None = None
    interpret: Any = None

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: jax.Array,
        cache_lengths: jax.Array,
        page_table: jax.Array,
        row_offsets: jax.Array,
        first_page: jax.Array,
        sinks: jax.Array | None,
        k_scale: jax.Array | None,
        v_scale: jax.Array | None,
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> tuple[jax.Array, jax.Array]:
        """As `maxlike.kernels.paged_attention.api.Implementation` says, which has the shapes."""
        _check(q, pages)
        T, N, _ = q.shape
        S, K = cache_lengths.shape[0], pages.shape[1]
        kv = jnp.concatenate([xla.quantise(k, k_scale, pages.dtype), xla.quantise(v, v_scale, pages.dtype)], axis=-1)
        pages = xla.write(kv, pages, cache_lengths, page_table, row_offsets, first_page)

        # Scores are in units of log2(e), for exp2; those to be capped, in what exp2 needs to give tanh.
        to_scores = scale * LOG2E if soft_cap is None else 2 * LOG2E * scale / soft_cap
        cache = _Cache(
            pages,
            page_table,
            first_page.reshape(1),
            jnp.full(K, to_scores, jnp.float32) * (1.0 if k_scale is None else k_scale),
            jnp.ones(K, jnp.float32) if v_scale is None else v_scale,
        )
        # No sink is one that the first real score wipes out.
        sinks = jnp.full(N, NO_SCORE, jnp.float32) if sinks is None else sinks * LOG2E

        batch = q, cache, cache_lengths, row_offsets, sinks, sliding_window, soft_cap
        t = jnp.arange(T)
        s = jnp.minimum(jnp.searchsorted(row_offsets[1:], t, side="right", method="compare_all"), S - 1)
        single = (row_offsets[1:] - row_offsets[:-1]) == 1
        out = self._decode(*batch)[s]
        if T > 1:
            out = jnp.where(single[s][:, None, None], out, self._prefill(*batch))
        return jnp.where((t < row_offsets[-1])[:, None, None], out, 0), pages

    def _decode(self, q, cache, cache_lengths, row_offsets, sinks, window, soft_cap):
        """Attention of the sequences that have one new token -> [S, N, H]; what stands for others has no meaning."""
        N, H = q.shape[1:]
        K, S = cache.pages.shape[1], len(cache_lengths)
        group = N // K
        plan = _Plan.make(H, cache.pages.shape[2], cache.pages.dtype, q.dtype, self.stages, decode=True)
        dtype, q = q.dtype, q.at[row_offsets[:-1]].get(mode="clip").reshape(S, K, group, H)
        q = jnp.pad(plan.operand(q), ((0, 0), (0, 0), (0, -group % 8), (0, 0)))  # whole tiles of shared memory
        items, owner, n_items = _cut_decode(plan, K, self.multiprocessors, cache_lengths, row_offsets, window)

        def paged_decode(items, pages, table, first_page, to_scores, q, o, m, l, *, o_smem, ml_smem, **scratch):
            index, worker = lax.axis_index("block"), lax.axis_index("worker")
            item, head = lax.div(index, jnp.int32(K)), lax.rem(index, jnp.int32(K))
            s, *numbers = (items[item, f] for f in range(5))
            span = _Span(plan.block, *numbers)
            shared = _Shared(plan, span, **scratch)

            @pl.when((span.n > 0) & (worker == plan.workers))
            def _():
                plgpu.set_max_registers(plan.fetch_registers, action="decrease")
                shared.fetch(pages, table, first_page[0], s, head)

            @pl.when((span.n > 0) & (worker < plan.workers))
            def _():
                plgpu.set_max_registers(plan.work_registers, action="increase")
                # Workers take turns at blocks. A row is a query head of the group; those beyond it are not looked at.
                my_q = shared.load_q(q.at[s, head], 0, rows=q.shape[2], mine=worker == 0)
                factor = to_scores[head]

                def add(i, carry):
                    i = i * plan.workers + worker
                    k, v = shared.wait(i, worker, cast=worker)

                    def seen():
                        j = span.position(i) + _iota(1, (ROWS, plan.block))
                        return (j >= span.start) & (j < span.stop)

                    carry = shared.add(carry, worker, my_q, k, v, factor, soft_cap, span.is_ragged(i), seen)
                    shared.release(i)
                    return carry

                n = lax.div(span.n + plan.workers - 1 - worker, jnp.int32(plan.workers))
                ml = ml_smem.at[worker]
                ml[0], ml[1], acc = lax.fori_loop(0, n, add, plan.nothing(NO_SCORE, 0.0))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(ml.at[0], m.at[item, worker, head])
                plgpu.copy_smem_to_gmem(ml.at[1], l.at[item, worker, head])
                for columns, x in zip(plan.chunks, acc, strict=True):
                    _store(o_smem.at[worker], x)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        o_smem.at[worker, pl.ds(0, group)], o.at[item, worker, head, :, columns]
                    )
                    plgpu.wait_smem_to_gmem(0)

        parts = len(items), plan.workers, K
        f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        o, m, l = self._kernel(
            paged_decode, plan, len(items) * K,
            (f32((*parts, group, H)), f32((*parts, ROWS)), f32((*parts, ROWS))),
            o_smem=plgpu.SMEM((plan.workers, ROWS, plan.columns), jnp.float32),
            ml_smem=plgpu.SMEM((plan.workers, 2, ROWS), jnp.float32),
        )(items, *cache[:4], q)  # fmt: skip
        return _combine(o, m, l, cache.v_scale, sinks, owner, n_items, S).astype(dtype)

    def _prefill(self, q, cache, cache_lengths, row_offsets, sinks, window, soft_cap):
        """Attention of the sequences that have several new tokens -> [T, N, H]; other tokens' rows have no meaning."""
        T, N, H = q.shape
        group = N // cache.pages.shape[1]
        plan = _Plan.make(H, cache.pages.shape[2], cache.pages.dtype, q.dtype, self.stages, decode=False)
        heads = plan.workers if group % plan.workers == 0 else 1  # workers have a head each, or share one's tokens
        width = ROWS * plan.workers // heads
        dtype, q = q.dtype, plan.operand(jnp.pad(q, ((0, max(0, width - T)), (0, 0), (0, 0))))
        tiles = _cut_prefill(plan, width, T, len(q), cache_lengths, row_offsets, window)
        n_tiles, n_blocks = len(tiles), N // heads
        whole_rows = plan.columns % 64 == 0  # staged rows begin at multiples of 128 bytes, as copies need it

        def paged_prefill(items, pages, table, first_page, to_scores, v_scale, sinks, q, out, *, o_smem, **scratch):
            index, worker = lax.axis_index("block"), lax.axis_index("worker")
            # The last tiles of a sequence see most: they begin first.
            tile = n_tiles - 1 - lax.div(index, jnp.int32(n_blocks))
            head = lax.rem(index, jnp.int32(n_blocks)) * heads
            s, *numbers, row, first, end, position = (items[tile, f] for f in range(9))
            kv_head = lax.div(head, jnp.int32(group))
            span = _Span(plan.block, *numbers)
            shared = _Shared(plan, span, **scratch)

            @pl.when((span.n > 0) & (worker == plan.workers))
            def _():
                plgpu.set_max_registers(plan.fetch_registers, action="decrease")
                shared.fetch(pages, table, first_page[0], s, kv_head)

            @pl.when((span.n > 0) & (worker < plan.workers))
            def _():
                plgpu.set_max_registers(plan.work_registers, action="increase")
                my_head, shift = (head + worker, 0) if heads > 1 else (head, worker * ROWS)
                my_row, my_position = row + shift, position + shift
                my_q = shared.load_q(q.at[pl.ds(my_row, ROWS), my_head], worker, rows=ROWS)
                factor = to_scores[kv_head]

                def add(i, carry):
                    k, v = shared.wait(i, worker, cast=lax.rem(i, jnp.int32(plan.workers)))
                    j0 = span.position(i)
                    masked = j0 + plan.block - 1 > my_position
                    if window is not None:
                        masked |= j0 <= my_position + ROWS - 1 - window

                    def seen():
                        at = my_position + _iota(0, (ROWS, plan.block))
                        j = j0 + _iota(1, (ROWS, plan.block))
                        return (j <= at) if window is None else (j <= at) & (j > at - window)

                    carry = shared.add(carry, worker, my_q, k, v, factor, soft_cap, masked, seen)
                    shared.release(i)
                    return carry

                _, l, acc = lax.fori_loop(0, span.n, add, plan.nothing(sinks[my_head], 1.0))
                weight = v_scale[kv_head] / l
                staged = o_smem.at[worker]
                begin, stop = jnp.maximum(first - my_row, 0), jnp.minimum(end - my_row, ROWS)
                all_mine = (begin == 0) & (stop == ROWS) & whole_rows

                def store_whole(columns):
                    plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(my_row, ROWS), my_head, columns])

                def store_rows(columns):  # other rows are another tile's
                    @pl.loop(begin, stop)
                    def _(i):
                        plgpu.copy_smem_to_gmem(
                            staged.at[i, pl.ds(0, plan.columns)], out.at[my_row + i, my_head, columns]
                        )

                for columns, x in zip(plan.chunks, acc, strict=True):
                    x *= lax.broadcast_in_dim(weight, x.shape, [0])
                    _store(staged.at[:, pl.ds(0, plan.columns)], x.astype(dtype))
                    plgpu.commit_smem()
                    if whole_rows:
                        pl.when(all_mine)(functools.partial(store_whole, columns))
                    pl.when(~all_mine)(functools.partial(store_rows, columns))
                    plgpu.wait_smem_to_gmem(0)

        return self._kernel(
            paged_prefill, plan, n_tiles * n_blocks, jax.ShapeDtypeStruct((T, N, H), dtype),
            o_smem=plgpu.SMEM((plan.workers, ROWS, -(-plan.columns // 64) * 64), dtype),
        )(tiles, *cache, sinks, q)  # fmt: skip

    def _kernel(self, body, plan, n_blocks, out_type, **staging):
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=staging | plan.scratch(interpreted=self.interpret is not None),
            grid=(n_blocks,),
            grid_names=("block",),
            num_threads=plan.workers + 1,
            thread_name="worker",
            # Under Lane semantics layouts are what is written here, and no solver's choice.
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            interpret=self.interpret,
        )


class _Cache(NamedTuple):
    """What the kernels read the cache with."""

    pages: jax.Array
    table: jax.Array
    first_page: jax.Array  # int32[1]
    to_scores: jax.Array  # float32[K]
    v_scale: jax.Array  # float32[K]


class _Span(NamedTuple):
    """The blocks of one sequence that a thread block reads."""

    block: int
    first: jax.Array  # n blocks from this one on
    n: jax.Array
    start: jax.Array  # of which positions [start, stop) count
    stop: jax.Array

    def position(self, i):
        """The first position of the i-th block."""
        return (self.first + i) * self.block

    def is_ragged(self, i):
        """Whether the i-th block has positions that do not count."""
        return (self.position(i) < self.start) | (self.position(i) + self.block > self.stop)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a kernel divides its work and its shared memory."""

    head_dim: int
    page_size: int
    page_dtype: Any
    dtype: Any  # of the operands of the matrix products
    decode: bool
    workers: int  # warpgroups that multiply; one more fetches
    stages: int  # blocks of K and V in shared memory at a time

    @classmethod
    def make(cls, head_dim, page_size, page_dtype, q_dtype, stages, decode):
        """The plan for one of the two kernels; raises `ValueError` where two stages do not fit."""
        # float8_e4m3fn becomes float16 in one instruction, and bfloat16 only through float32. Both hold it exactly.
        dtype = jnp.dtype(jnp.float16) if page_dtype == jnp.float8_e4m3fn else q_dtype
        for workers in (2, 1):
            plan = cls(head_dim, page_size, page_dtype, dtype, decode, workers, stages=1)
            fit = (SHARED_MEMORY - plan._fixed_bytes) // plan._stage_bytes
            if fit >= (stages or 2):
                return dataclasses.replace(plan, stages=stages or min(fit, MAX_STAGES))
        raise ValueError(
            f"MosaicGpu(stages={stages}): {stages or 2} blocks of {plan.block} tokens, {plan._stage_bytes} bytes each, "
            f"and {plan._fixed_bytes} bytes beside them exceed the {SHARED_MEMORY} bytes of shared memory; fewer "
            "stages, or implementation=Xla()"
        )

    @property
    def block(self):
        """Tokens of K and V in a stage. Scores of more would not fit into registers."""
        return 128 if self.head_dim <= 64 and not self.decode else 64

    @property
    def columns(self):
        """Of V that are multiplied at a time, and of the output that are staged at a time."""
        tile = self._swizzle(self.dtype) // 2
        return self.head_dim if self.head_dim <= (64 if self.decode and tile == 64 else 128) else tile

    @property
    def chunks(self):
        """The columns of V, taken apart so."""
        return [pl.ds(c, self.columns) for c in range(0, self.head_dim, self.columns)]

    def lanes(self, half):
        """Of the keys (half 0) or the values (1) of a slot, those that are in registers at a time."""
        H, width = self.head_dim, self.head_dim
        if H > 128:  # whole tiles of both dtypes
            width = max(self._swizzle(dtype) // dtype.itemsize for dtype in (self.dtype, self.page_dtype))
        return [pl.ds(half * H + c, width) for c in range(0, H, width)]

    @property
    def copy_tokens(self):
        """Tokens of one copy from the pages: they lie in one page and fill a block."""
        return math.gcd(self.page_size, self.block)

    @property
    def narrow(self):
        """Whether the cache is of 8 bits, and has to be widened for the matrix products."""
        return self.page_dtype.itemsize == 1

    @property
    def together(self):
        """Workers that read the same block. Decoding they take turns at blocks, with the same queries."""
        return 1 if self.decode else self.workers

    @property
    def work_registers(self):
        """Registers of a thread that multiplies. With `fetch_registers` and their threads they make 64 Ki."""
        return 232 if self.workers == 2 else 240

    fetch_registers = 40

    @property
    def _stage_bytes(self):
        return self.block * 2 * self.head_dim * self.page_dtype.itemsize

    @property
    def _fixed_bytes(self):
        q = self.together * ROWS * self.head_dim * 2
        casts = self.workers * self.block * 2 * self.head_dim * 2 if self.narrow else 0
        staging = self.workers * ROWS * (4 * (self.columns + 2) if self.decode else -(-self.columns // 64) * 128)
        return q + casts + staging

    def _swizzle(self, dtype):
        """Bytes: the widest swizzle whose tiles divide a head, or None."""
        return next((n for n in (128, 64, 32) if self.head_dim * dtype.itemsize % n == 0), None)

    def _tiles(self, dtype):
        swizzle = self._swizzle(dtype)
        if swizzle is None:
            return ()
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # type: ignore[abstract]  # so jax 0.12 has it
        return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]

    def operand(self, q):
        """q as the matrix products take it."""
        if self.dtype == jnp.float16:  # bfloat16 reaches further: the largest, and no infinity
            q = jnp.clip(q.astype(jnp.float32), -65504, 65504)
        return q.astype(self.dtype)

    def scratch(self, interpreted):
        """The shared memory and the barriers that `_Shared` takes."""
        kv, tiles = (self.block, 2 * self.head_dim), self._tiles(self.dtype)
        scratch = dict(
            ring=plgpu.SMEM((self.stages, *kv), self.page_dtype, transforms=self._tiles(self.page_dtype)),
            q_smem=plgpu.SMEM((self.together, ROWS, self.head_dim), self.dtype, transforms=tiles),
            loaded=plgpu.Barrier(num_arrivals=self.block // self.copy_tokens, num_barriers=self.stages),
            free=plgpu.Barrier(num_arrivals=self.together, num_barriers=self.stages),
            q_loaded=plgpu.Barrier(num_barriers=self.together),
        )
        if self.narrow:
            # So many that a worker fills one while none reads it.
            scratch["casts"] = plgpu.SMEM((self.workers, *kv), self.dtype, transforms=tiles)
        if self.together > 1:
            scratch["met"] = plgpu.Barrier(num_arrivals=self.together)
        if interpreted:
            scratch["p_smem"] = plgpu.SMEM((self.workers, ROWS, self.block), self.dtype)
        return scratch

    def nothing(self, m, l):
        """The softmax of no positions yet: maximum, sum, and weighted values in chunks of columns."""
        m, l = (plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), WGMMA.reduce(1)) for x in (m, l))
        acc = tuple(plgpu.layout_cast(jnp.zeros((ROWS, self.columns), jnp.float32), WGMMA) for _ in self.chunks)
        return m, l, acc


class _Shared:
    """The shared memory of a thread block, and what its warpgroups do with it."""

    def __init__(self, plan, span, *, ring, q_smem, loaded, free, q_loaded, casts=None, met=None, p_smem=None):
        self.plan, self.span = plan, span
        self.ring, self.q_smem, self.casts, self.p_smem = ring, q_smem, casts, p_smem
        self.loaded, self.free, self.q_loaded, self.met = loaded, free, q_loaded, met

    def fetch(self, pages, table, first_page, s, head):
        """Copies the span's blocks of K and V into the ring, one after the other, as far as there is room."""
        plan, span = self.plan, self.span
        size = plan.copy_tokens
        in_page = plan.page_size // size
        oldest, newest = (lax.div(j, jnp.int32(plan.page_size)) for j in (span.start, span.stop - 1))
        lanes = pl.ds(0, 2 * plan.head_dim)

        def rows(i):
            """The page row of each copy of the i-th block. Copies that nobody needs repeat a page that is needed."""
            copies = [(span.first + i) * (plan.block // size) + part for part in range(plan.block // size)]
            page = [jnp.clip(lax.div(c, jnp.int32(in_page)), oldest, newest) for c in copies]
            return tuple(first_page + table[s, p] for p in page)

        def copy(i, these):
            following = rows(i + 1)  # read ahead: the copies would wait for the table otherwise
            slot = lax.rem(i, jnp.int32(plan.stages))

            @pl.when(i >= plan.stages)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            for part, row in enumerate(these):
                c = (span.first + i) * (plan.block // size) + part
                plgpu.copy_gmem_to_smem(
                    pages.at[row, head, pl.ds(lax.rem(c, jnp.int32(in_page)) * size, size), lanes],
                    self.ring.at[slot, pl.ds(part * size, size)],
                    self.loaded.at[slot],
                )
            return following

        lax.fori_loop(0, span.n, copy, rows(0))

    def load_q(self, q, i, rows, mine=True):
        """Waits for queries [rows, H] in the i-th place, and copies them there where that is this worker's part."""
        place = self.q_smem.at[i]

        @pl.when(mine)
        def _():
            plgpu.copy_gmem_to_smem(q, place.at[pl.ds(0, rows)], self.q_loaded.at[i])

        plgpu.barrier_wait(self.q_loaded.at[i])
        return place

    def wait(self, i, worker, cast):
        """K and V of the i-th block, ready to be multiplied: zeros stand for values that do not count, NaN perhaps.

        Workers that read the same block share the work, and wait for each other.
        """
        plan, span = self.plan, self.span
        together = plan.together > 1
        slot = lax.rem(i, jnp.int32(plan.stages))
        plgpu.barrier_wait(self.loaded.at[slot])
        kv = self.ring.at[slot]

        def blank(x, layout):
            j = span.position(i) + _iota(0, x.shape, layout)
            return jnp.where((j >= span.start) & (j < span.stop), x, 0)

        def meet():
            plgpu.commit_smem()
            if together:
                plgpu.barrier_arrive(self.met)
                plgpu.barrier_wait(self.met)

        if plan.narrow:
            layout, tiled = plgpu.Layout.WGMMA_UPCAST_2X, plan._swizzle(plan.page_dtype) is not None

            def widen(half):
                for lanes in plan.lanes(half):
                    x = plgpu.load(kv.at[:, lanes], optimized=tiled)  # type: ignore[call-arg]  # 0.10 wants an index
                    x = plgpu.layout_cast(x, layout).astype(plan.dtype)
                    if half == 1:
                        x = lax.cond(span.is_ragged(i), lambda x: blank(x, layout), lambda x: x, x)
                    self.casts.at[cast, :, lanes][...] = x

            for half in (0, 1):
                pl.when(worker == half if together else True)(functools.partial(widen, half))
            meet()
            plgpu.barrier_arrive(self.free.at[slot])
            kv = self.casts.at[cast]
        else:

            @pl.when(span.is_ragged(i))
            def _():
                @pl.when(worker == 0 if together else True)
                def _():
                    for lanes in plan.lanes(1):
                        kv.at[:, lanes][...] = blank(kv[:, lanes], WGMMA)

                meet()

        return kv.at[:, pl.ds(0, plan.head_dim)], kv.at[:, pl.ds(plan.head_dim, plan.head_dim)]

    def release(self, i):
        """Gives the i-th block's place back. (A widened block's place was given back at once.)"""
        if not self.plan.narrow:
            plgpu.barrier_arrive(self.free.at[lax.rem(i, jnp.int32(self.plan.stages))])

    def add(self, carry, worker, q, k, v, factor, soft_cap, masked, seen):
        """The softmax so far (see `_Plan.nothing`), with a block added: where masked, only scores that seen() has."""
        plan = self.plan
        m, l, acc = carry

        def product(a, b, onto=None):
            def multiply(sum_ref):
                plgpu.wgmma(sum_ref, a, b)
                return sum_ref[...]

            if onto is not None and self.p_smem is None:
                return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, a, b))(plgpu.ACC.init(onto))
            new = pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))
            return new if onto is None else onto + new

        scores = product(q, k.transpose((1, 0))) * factor
        if soft_cap is not None:
            # tanh(x) = 1 - 2 / (1 + exp(2 x)): the hardware's own tanh has eleven bits
            scores = soft_cap * LOG2E - 2 * soft_cap * LOG2E / (1 + jnp.exp2(scores))
        scores = lax.cond(masked, lambda x: jnp.where(seen(), x, NO_SCORE), lambda x: x, scores)
        m_next = jnp.maximum(m, scores.max(axis=1))
        p = jnp.exp2(scores - lax.broadcast_in_dim(m_next, scores.shape, [0]))
        shrink = jnp.exp2(m - m_next)
        l = shrink * l + p.sum(axis=1)
        p = p.astype(plan.dtype)
        if self.p_smem is not None:  # the interpreter multiplies from shared memory only, and onto nothing
            self.p_smem.at[worker][...] = p
            plgpu.commit_smem()
            p = self.p_smem.at[worker]
        acc = tuple(
            product(p, v.at[:, columns], onto=x * lax.broadcast_in_dim(shrink, x.shape, [0]))
            for columns, x in zip(plan.chunks, acc, strict=True)
        )
        return m_next, l, acc


def _iota(dimension, shape, layout=WGMMA):
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=layout)


def _store(ref, x):
    """Writes x to shared memory whose rows follow each other: banks conflict, and that is known."""
    if hasattr(plgpu, "store"):  # not in jax 0.11, whose assignment does not look for conflicts
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _cut_decode(plan, K, multiprocessors, cache_lengths, row_offsets, window):
    """Cuts what sequences with one new token see into items, of which each makes K thread blocks.

    Returns int32[n, 5] (sequence, and a `_Span`: of no blocks in rows that are no item), the column of sequences, and
    the number of items. A sequence's items are of one length, to a block.
    """
    S = len(cache_lengths)
    decodes = row_offsets[1:] - row_offsets[:-1] == 1
    stop = cache_lengths + 1
    start = jnp.zeros_like(stop) if window is None else jnp.maximum(0, stop - window)
    first = start // plan.block
    blocks = jnp.where(decodes, -(-stop // plan.block) - first, 0)
    # One multiprocessor runs one thread block at a time. Long items leave some without work in the last wave, short
    # ones start often: of a few lengths, the one with which the last wave ends first.
    a_wave = max(1, multiprocessors // K)
    lengths = jnp.maximum(plan.workers, -(-blocks.sum() // (a_wave * jnp.arange(1, WAVES + 1))))
    waves = -(-K * (-(-blocks[:, None] // lengths)).sum(axis=0) // multiprocessors)
    at_most = lengths[jnp.argmin(waves * (jnp.minimum(lengths, blocks.max()) + START))]
    parts = -(-blocks // at_most)
    ends = jnp.cumsum(parts)
    i = jnp.arange(S + WAVES * a_wave)
    s = jnp.minimum(jnp.searchsorted(ends, i, side="right", method="compare_all"), S - 1)
    part, n_parts = i - (ends - parts)[s], jnp.maximum(parts[s], 1)
    begin, end = (blocks[s] * p // n_parts for p in (part, part + 1))
    items = s, first[s] + begin, jnp.where(i < ends[-1], end - begin, 0), start[s], stop[s]
    return jnp.stack(items, axis=1).astype(jnp.int32), s, ends[-1]


def _cut_prefill(plan, width, T, padded_T, cache_lengths, row_offsets, window):
    """Cuts the new tokens of sequences with several into tiles of `width` -> int32[n, 9].

    Fields: sequence, a `_Span` (of no blocks in rows that are no tile), the row of q where the tile begins, its own
    tokens (first, end), and the position of that row's token (negative for a row of an earlier sequence).
    """
    S = len(cache_lengths)
    new = row_offsets[1:] - row_offsets[:-1]
    n_tiles = jnp.where(new > 1, -(-new // width), 0)
    ends = jnp.cumsum(n_tiles)
    i = jnp.arange(min(S, T // 2) + T // width)
    s = jnp.minimum(jnp.searchsorted(ends, i, side="right", method="compare_all"), S - 1)
    first = row_offsets[s] + (i - (ends - n_tiles)[s]) * width
    end = jnp.minimum(first + width, row_offsets[s + 1])
    row = jnp.clip(first, 0, padded_T - width)
    to_position = cache_lengths[s] - row_offsets[s]
    stop = end + to_position
    start = jnp.zeros_like(stop) if window is None else jnp.maximum(0, first + to_position - window + 1)
    first_block = start // plan.block
    n = jnp.where(i < ends[-1], -(-stop // plan.block) - first_block, 0)
    return jnp.stack([s, first_block, n, start, stop, row, first, end, row + to_position], axis=1).astype(jnp.int32)


def _combine(o, m, l, v_scale, sinks, owner, n_items, S):
    """Joins items' softmaxes, o [n, workers, K, G, H] and m, l [n, workers, K, >= G], by sequence -> [S, N, H].

    As a product with mostly zeros: it reads o once, and sums in one order. On a GPU its operands are rounded to
    tfloat32, an eighth of what rounding the result to bfloat16 does.
    """
    n, workers, K, G, H = o.shape
    N = K * G
    o = o.reshape(n * workers, N, H)
    m, l = (x[..., :G].reshape(n * workers, N) for x in (m, l))
    owner = jnp.repeat(owner, workers)
    item = jnp.arange(n * workers)[:, None] < n_items * workers
    own = (jnp.arange(S)[:, None] == owner) & item[:, 0]  # [S, items]
    largest = jnp.maximum(jnp.where(own[..., None], m, NO_SCORE).max(axis=1), sinks)  # [S, N]
    weight = jnp.where(item, jnp.exp2(m - largest[owner]), 0)
    own = own.astype(jnp.float32)
    total = jnp.matmul(own, jnp.where(item, weight * l, 0), precision="highest") + jnp.exp2(sinks - largest)
    # What stands in the place of an item that is not there may be NaN.
    o = jnp.einsum("si,inh->snh", own, jnp.where(item[..., None], weight[..., None] * o, 0))
    return o * (jnp.repeat(v_scale, G) / total)[..., None]


def supported() -> bool:
    """Whether this jax has the Mosaic GPU that the kernels are written for."""
    return hasattr(plgpu, "InterpretGPUParams")


def _check(q, pages):
    """Raises `ValueError` for what the kernels cannot do."""
    N, H = q.shape[1:]
    _, K, page_size, W = pages.shape
    says = []
    if not supported():
        says.append(f"jax {jax.__version__} is older than {OLDEST_JAX}, the first whose Mosaic GPU it was written for")
    if q.dtype.name not in ("bfloat16", "float16") or pages.dtype.name not in (q.dtype.name, *xla.LARGEST):
        says.append(
            f"q of {q.dtype} with pages of {pages.dtype}: it takes bfloat16 or float16, and pages of the same or of "
            f"{' or '.join(xla.LARGEST)} (the tensor cores have no float32 product, and tfloat32 has 11 bits)"
        )
    if H % 16 or not 16 <= H <= 256:
        says.append(f"head width {H}: it takes multiples of 16, from 16 to 256")
    if pages.dtype.itemsize == 1 and H % 32 and H > 128:
        says.append(f"head width {H} in {pages.dtype}: over 128 it takes multiples of 32")
    if page_size % 8:
        says.append(f"pages of {page_size} tokens: it takes multiples of 8")
    if N // K > ROWS:
        says.append(f"{N // K} query heads a KV head: it takes {ROWS} at most")
    if W * pages.dtype.itemsize % 16:
        says.append(f"slots of {W} lanes of {pages.dtype}: it takes multiples of 16 bytes")
    if says:
        raise ValueError(f"MosaicGpu() cannot do this: {'; '.join(says)}. Pass implementation=Xla()")
