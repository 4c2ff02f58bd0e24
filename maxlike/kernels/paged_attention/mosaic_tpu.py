"""Ragged paged attention for TPU: one Pallas kernel that writes a step's K and V into the pages and attends.

The two floors. *Bytes*: a decode reads each live K and V once, 2 * H * itemsize bytes a token and KV head, and does
4 * H * (N / K) operations on them: far below the 240 to 560 operations a byte at which these chips balance, so decode
is bound by HBM. *Operations*: a prefill chunk of n tokens reads a page once for n * (N / K) rows, and is bound by the
matrix units from about n * (N / K) = 256 rows on.

What overlaps with what. Three loops run one after the other, each over a work list that the scalar core makes of the
offsets:

1. *Writes* of chunks (sequences with two or more new tokens): an aligned run of slots is read, merged and written
   back; the next run is on its way in and the last on its way out meanwhile.
2. *Decodes* (one new token): the group of query heads that shares a KV head is folded into the rows of one product.
   K and V arrive in blocks of whole pages, double-buffered; with a sequence's last block in hand, the first of the
   next sequence is fetched. The new token is merged into that last block in VMEM, where it is needed anyway, and
   only the packed tile of rows around it goes back: its K and V are never read again.
3. *Tiles* of chunks: tokens times group make the rows, and the blocks arrive as for decodes.

Why this layout. A page `[K, page_size, W]` is contiguous, in HBM and in the buffer, so one DMA brings it whatever the
number of heads; a head's slots are then rows, and K and V of a slot lie side by side in W lanes, a multiple of 128.
The slices that products need begin at whole registers: K is `[0, ceil128(H))`, of which q's zeros blot out what
belongs to V, and V is `[floor128(H), ceil128(2 H))`, of which the surplus lanes are cut off outside. So head widths
of 64 to 256 share one kernel and no lane is ever moved.

The softmax is accumulated online (Milakov and Gimelshein 2018, arXiv:1805.02867) in float32. Quantised caches are
converted, not multiplied: k_scale joins the scale of the scores, v_scale that of the output, both per KV head. A sink
is where the softmax starts: maximum `sink`, sum 1, no value.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlike.kernels.paged_attention.xla import LARGEST, NO_SCORE, quantise

LANES = 128
SMALLEST_VMEM = 16 * 2**20  # of any TPU that is compiled for (v4); assumed where the target is not a TPU (interpreting)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class MosaicTpu:
    """Ragged paged attention by the kernel of this module.

    Args:
      block_tokens: tokens of K and V that a buffer holds, whole pages and a multiple of 128; None: as many as cover
        the latency of HBM, about 1,024 at most, and fewer where VMEM is short.
      tile_rows: rows of a product in prefill, tokens times N / K; None: 256, fewer with many KV heads.
      interpret: run on CPU: True, or `pltpu.InterpretParams` for the simulation of a TPU's memories and DMAs.
    """

    block_tokens: int | None = None
    tile_rows: int | None = None
    interpret: bool | pltpu.InterpretParams = False

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
        """As `maxlike.kernels.paged_attention.api.Implementation` says, which has the shapes.

        Raises:
          ValueError: a head width, page size, dtype or page table that the kernel cannot do, or blocks that the
            target's VMEM does not hold; with the numbers.
        """
        out, pages, _ = self.run(
            q, k, v, pages, cache_lengths, page_table, row_offsets, first_page, sinks, k_scale, v_scale,
            scale=scale, sliding_window=sliding_window, soft_cap=soft_cap, count_bytes=False,
        )  # fmt: skip
        return out, pages

    def run(
        self, q, k, v, pages, cache_lengths, page_table, row_offsets, first_page, sinks, k_scale, v_scale, *,
        scale, sliding_window, soft_cap, count_bytes,
    ):  # fmt: skip
        """As a call, and a third result: None, or with `count_bytes` what the DMAs of pages moved as they started.

        That is int32[2], read and written, in units of 512 bytes, lane padding counted.

        Raises:
            ValueError: the program is for another platform, or the kernel cannot do these shapes.
        """
        target = _target()
        if not self.interpret and target is None:
            raise ValueError(
                "MosaicTpu runs on TPUs, and this is compiled for another platform: use implementation=Xla(), or "
                "MosaicTpu(interpret=True) to try it there"
            )
        sizes = _Sizes.plan(self, target, q, pages, page_table, scale, sliding_window, soft_cap)
        kv = _stored_values(sizes, k, v, pages.dtype, k_scale, v_scale)
        q_decode, kv_decode, q_chunk, kv_chunk = _arrange(sizes, q.astype(sizes.dtype), kv)
        scalars = (jnp.atleast_1d(first_page), cache_lengths, row_offsets, page_table.reshape(-1))

        k_scale, v_scale = _scale_rows(sizes, k_scale, v_scale)
        arrays = [] if sinks is None else [_sink_rows(sizes, sinks)]
        arrays += [q_decode, kv_decode, q_chunk, kv_chunk, k_scale, v_scale, pages]
        out_decode, out_chunk, pages, counts = _call(sizes, self.interpret, count_bytes, scalars, arrays)
        return _merge(sizes, out_decode, out_chunk, row_offsets).astype(q.dtype), pages, counts


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """All that is static about a call. Rows are those of products, tokens those of the cache or the step."""

    T: int
    S: int
    K: int
    G: int  # query heads that share a KV head
    H: int
    W: int  # lanes of a slot
    M: int  # pages a sequence may have
    page_size: int
    dtype: jnp.dtype  # of the products' operands
    cache_dtype: jnp.dtype
    step_pages: int  # pages that a product takes at a time
    block_pages: int  # pages that a buffer holds: so many steps
    tile: int  # tokens of a tile
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def block(self):
        return self.block_pages * self.page_size

    @property
    def step(self):
        return self.step_pages * self.page_size

    @property
    def token_align(self):  # rows of a packed tile of q and the output
        return 32 // self.dtype.itemsize

    @property
    def slot_align(self):  # rows of a packed tile of the cache: the least that can be written
        rows = 32 // self.cache_dtype.itemsize
        return self.page_size if self.page_size % rows else rows

    @property
    def unit(self):  # slots that a chunk's write merges at a time: some of a page
        divides = [n for n in (64, 32, 16) if self.page_size % n == 0 and n % self.slot_align == 0]
        return divides[0] if divides else self.page_size

    @property
    def decode_rows(self):
        return _ceil(self.G, 8)

    @property
    def tile_rows(self):
        return self.G * self.tile

    @property
    def k_lanes(self):
        return _ceil(self.H, LANES)

    @property
    def v_first(self):
        return self.H // LANES * LANES

    @property
    def v_lanes(self):
        return _ceil(2 * self.H, LANES) - self.v_first

    @property
    def list_lengths(self):  # of the work lists, at most: decodes; units, twice; tiles, twice
        tiles, units = (max(1, self.T // n + 2 * self.n_chunks) for n in (self.tile, self.unit))
        return self.S, units, units, tiles, tiles

    @property
    def n_chunks(self):
        return min(self.S, self.T // 2)

    @classmethod
    def plan(cls, blocks, target, q, pages, page_table, scale, sliding_window, soft_cap):
        """The sizes of a call: what the heuristic takes for blocks, checked against the target's memories."""
        (T, N, H), (_, K, page_size, W), (S, M) = q.shape, pages.shape, page_table.shape
        dtype = q.dtype if pages.dtype.name in LARGEST else jnp.promote_types(q.dtype, pages.dtype)
        _check_shapes(H, page_size, W, dtype, pages.dtype)
        smem, vmem, bandwidth = (
            (target.smem_capacity_bytes, target.vmem_capacity_bytes, target.mem_bw_bytes_per_second)
            if target else (MIB, SMALLEST_VMEM, 8e11)
        )  # fmt: skip
        page_bytes = K * page_size * W * pages.dtype.itemsize
        least = math.lcm(page_size, LANES) // page_size  # pages that make whole registers of scores
        if blocks.block_tokens is not None:
            if blocks.block_tokens < 1 or blocks.block_tokens % (least * page_size):
                raise ValueError(
                    f"block_tokens must be a multiple of {least * page_size} (of 128 tokens, and of pages of "
                    f"{page_size}); given {blocks.block_tokens}"
                )
            block_pages = blocks.block_tokens // page_size
        else:
            # Two microseconds' worth of bytes on the way hide a DMA's latency.
            block_pages = min(-(-int(2e-6 * bandwidth) // page_bytes), 1024 // page_size, M)
        # A product takes up to 512 tokens: whole registers of scores, and little lost on a short sequence.
        step_pages = min(max(512 // page_size // least, 1) * least, _ceil(block_pages, least))
        if blocks.block_tokens is not None:
            step_pages = math.gcd(step_pages, block_pages)
        block_pages = _ceil(block_pages, step_pages)
        wanted_rows = min(256, max(4096 // K, 1)) if blocks.tile_rows is None else blocks.tile_rows
        if wanted_rows < 1:
            raise ValueError(f"tile_rows must be at least 1; given {blocks.tile_rows}")
        align = 32 // dtype.itemsize
        tile = max(align, 1 << (max(wanted_rows // (N // K), 1).bit_length() - 1))
        tile = min(tile, max(align, 1 << (T - 1).bit_length()))

        def sized(block_pages, tile):
            return cls(T, S, K, N // K, H, W, M, page_size, dtype, pages.dtype, min(step_pages, block_pages),
                       block_pages, tile, scale, sliding_window, soft_cap)  # fmt: skip

        sizes = sized(block_pages, tile)
        most = vmem * 7 // 8
        while sizes.vmem_needed > most and blocks.block_tokens is None and sizes.block_pages > least:
            fewer = sizes.block_pages - (step_pages if sizes.block_pages > step_pages else least)
            sizes = sized(fewer, sizes.tile)
        while sizes.vmem_needed > most and blocks.tile_rows is None and sizes.tile > align:
            sizes = sized(sizes.block_pages, sizes.tile // 2)
        if sizes.vmem_needed > most:
            raise ValueError(
                f"MosaicTpu needs {sizes.vmem_needed / MIB:.1f} MiB of VMEM for blocks of {sizes.block} tokens and "
                f"tiles of {sizes.tile_rows} rows with {K} KV heads of {H} in {pages.dtype}; the target has "
                f"{vmem / MIB:.0f} MiB, of which {most / MIB:.1f} can be had. Use smaller blocks, smaller pages than "
                f"{page_size} tokens, more devices, or implementation=Xla()."
            )
        # Last: the lists' lengths depend on the tile.
        smem_needed = 4 * (S * M + 2 * S + sum(sizes.list_lengths))
        if smem_needed > smem * 3 // 4:
            raise ValueError(
                f"MosaicTpu keeps the page table in SMEM: {S} sequences of {M} pages, and lists for {T} tokens, take "
                f"{smem_needed} bytes; of {smem} three quarters can be had. Use larger pages than {page_size} tokens, "
                "fewer sequences a step, or implementation=Xla()."
            )
        return sizes

    @property
    def vmem_needed(self):
        """Bytes of VMEM: the larger of the phases' buffers, the statistics, and the values of one product."""
        item, cache_item = self.dtype.itemsize, self.cache_dtype.itemsize
        rows = max(self.decode_rows, self.tile_rows)
        blocks = 2 * self.K * self.block * self.W * cache_item
        stats = self.K * rows * (2 * LANES + self.v_lanes) * 4
        decode = 2 * self.K * (self.decode_rows * (self.k_lanes + self.v_lanes) * item + self.slot_align * self.W
                               * cache_item) + 2 * _ceil(self.K, 8) * self.W * 4  # fmt: skip
        tiles = self.K * self.tile_rows * (2 * self.k_lanes + 2 * self.v_lanes) * item
        writes = 2 * self.K * self.W * ((self.unit + 8) * 4 + self.unit * cache_item)
        sinks = self.K * self.decode_rows * LANES * 4
        values = 4 * rows * self.step * 4 + self.step * (self.k_lanes + self.v_lanes) * (4 + item)
        return max(writes, blocks + stats + max(decode, tiles) + values) + sinks + MIB


def _ceil(n, multiple):
    return -(-n // multiple) * multiple


def _target():
    """What is known of the TPU that is compiled for; None where that is none."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return pltpu.get_tpu_info() if platform == "tpu" else None


def _check_shapes(H, page_size, W, dtype, cache_dtype):
    use_xla = "use implementation=Xla()"
    if H % 8 or not 8 <= H <= 256:
        raise ValueError(f"MosaicTpu takes head widths that are multiples of 8, up to 256; given {H}: {use_xla}")
    if page_size % 16 or not 16 <= page_size <= 256:
        raise ValueError(f"MosaicTpu takes pages of 16 to 256 tokens, multiples of 16; given {page_size}: {use_xla}")
    if W % LANES:
        raise ValueError(
            f"MosaicTpu takes slots of a multiple of {LANES} lanes, as KVCacheParams.allocate makes them for a TPU: "
            f"{_ceil(2 * H, LANES)} for heads of {H}; given {W}. Make the cache so, or {use_xla}"
        )
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"MosaicTpu takes queries in float32 or bfloat16; given {dtype}: {use_xla}")
    if cache_dtype not in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
        raise ValueError(
            f"MosaicTpu takes caches in float32, bfloat16, int8 or float8_e4m3fn; given {cache_dtype}: {use_xla}"
        )


# --- Before and after the kernel, by XLA


def _stored_values(sizes, k, v, dtype, k_scale, v_scale):
    """The step's slots [T, K, W] as the cache will hold them, in float32, which holds any of its dtypes exactly."""
    kv = jnp.concatenate([quantise(k, k_scale, dtype), quantise(v, v_scale, dtype)], axis=-1).astype(jnp.float32)
    return jnp.pad(kv, ((0, 0), (0, 0), (0, sizes.W - 2 * sizes.H)))


def _arrange(sizes, q, kv):
    """q and the new slots by token [T, K, rows, lanes], for decodes, and by head [K, G, T, lanes], for chunks."""
    q = q.reshape(sizes.T, sizes.K, sizes.G, sizes.H)
    lanes = (0, sizes.k_lanes - sizes.H)
    q_decode = jnp.pad(q, ((0, 0), (0, 0), (0, sizes.decode_rows - sizes.G), lanes))
    kv_decode = jnp.pad(kv, ((0, 0), (0, _ceil(sizes.K, 8) - sizes.K), (0, 0)))
    behind = _ceil(sizes.T, sizes.token_align) + sizes.tile - sizes.T
    q_chunk = jnp.pad(q.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, behind), lanes))
    # A unit's slots are looked up from up to `unit` rows before the first token to as many behind the last.
    behind = _ceil(sizes.T, 8) - sizes.T + sizes.unit + 8
    kv_chunk = jnp.pad(kv.transpose(1, 0, 2), ((0, 0), (sizes.unit, behind), (0, 0)))
    return q_decode, kv_decode, q_chunk, kv_chunk


def _sink_rows(sizes, sinks):
    """Sinks as rows of a decode [K, decode_rows, 128], all lanes the same."""
    rows = jnp.pad(sinks.astype(jnp.float32).reshape(sizes.K, sizes.G), ((0, 0), (0, sizes.decode_rows - sizes.G)))
    return jnp.broadcast_to(rows[..., None], (*rows.shape, LANES))


def _scale_rows(sizes, k_scale, v_scale):
    ones = jnp.ones(sizes.K, jnp.float32)
    k_scale, v_scale = (ones if x is None else x.astype(jnp.float32) for x in (k_scale, v_scale))
    return sizes.scale * k_scale, v_scale


def _merge(sizes, out_decode, out_chunk, row_offsets):
    """Each token's output [T, N, H] from where it was computed; zero at padding."""
    lanes = slice(sizes.H - sizes.v_first, 2 * sizes.H - sizes.v_first)
    token = jnp.arange(sizes.T)
    single = row_offsets[1:] - row_offsets[:-1] == 1
    decodes = (single & (row_offsets[:-1] == token[:, None])).any(1)
    by_head = out_chunk[:, :, : sizes.T, lanes].transpose(2, 0, 1, 3)
    out = jnp.where(decodes[:, None, None, None], out_decode[:, :, : sizes.G, lanes], by_head)
    out = jnp.where((token < row_offsets[-1])[:, None, None, None], out, 0)
    return out.reshape(sizes.T, sizes.K * sizes.G, sizes.H)


# --- The kernel


def _call(sizes, interpret, count_bytes, scalars, arrays):
    has_sinks = len(arrays) == 8
    hbm, smem, vmem = (pl.BlockSpec(memory_space=space) for space in (pl.ANY, pltpu.SMEM, pltpu.VMEM))
    q_decode, _, q_chunk, _, _, _, pages = arrays[-7:]
    out_shape = [
        jax.ShapeDtypeStruct((*q_decode.shape[:3], sizes.v_lanes), sizes.dtype),
        jax.ShapeDtypeStruct((*q_chunk.shape[:3], sizes.v_lanes), sizes.dtype),
        jax.ShapeDtypeStruct(pages.shape, pages.dtype),
    ]
    out_specs = [hbm, hbm, hbm]
    if count_bytes:
        out_shape.append(jax.ShapeDtypeStruct((2,), jnp.int32))
        out_specs.append(smem)
    rows = max(sizes.decode_rows, sizes.tile_rows)
    out = pl.pallas_call(
        functools.partial(_kernel, sizes, has_sinks, count_bytes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[vmem] * has_sinks + [hbm, hbm, hbm, hbm, smem, smem, hbm],
            out_specs=out_specs,
            scratch_shapes=[
                *(pltpu.SMEM((n,), jnp.int32) for n in sizes.list_lengths),
                pltpu.VMEM((sizes.K, rows, LANES), jnp.float32),
                pltpu.VMEM((sizes.K, rows, LANES), jnp.float32),
                pltpu.VMEM((sizes.K, rows, sizes.v_lanes), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        input_output_aliases={len(scalars) + len(arrays) - 1: 2},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=sizes.vmem_needed),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*scalars, *arrays)
    return (*out, None)[:4]


def _kernel(sizes, has_sinks, count_bytes, first_row, lengths, offsets, table, *refs):
    sinks, refs = (refs[0], refs[1:]) if has_sinks else (None, refs)
    q_decode, kv_decode, q_chunk, kv_chunk, k_scale, v_scale, _, out_decode, out_chunk, pages = refs[:10]
    counts = refs[10] if count_bytes else None
    *lists, m, l, acc = refs[-8:]
    batch = _Batch(first_row, lengths, offsets, table, *lists)
    kernel = _Kernel(sizes, batch, pages, sinks, k_scale, v_scale, counts, m, l, acc)
    if counts is not None:
        counts[0] = 0
        counts[1] = 0
    n_decodes, n_units, n_tiles = _list_work(sizes, batch)
    if sizes.n_chunks:
        kernel.write_chunks(n_units, kv_chunk)
    kernel.decode(n_decodes, q_decode, kv_decode, out_decode)
    if sizes.n_chunks:
        kernel.attend_chunks(n_tiles, q_chunk, out_chunk)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What lies in SMEM: the step's numbers, and the lists that `_list_work` makes of them."""

    first_row: jax.Ref  # [1], of the layer's pages
    lengths: jax.Ref  # [S], before the step
    offsets: jax.Ref  # [S + 1]
    table: jax.Ref  # [S * M]
    decode_sequence: jax.Ref
    unit_sequence: jax.Ref
    unit: jax.Ref  # slots [unit * i, unit * (i + 1)) of the sequence
    tile_sequence: jax.Ref
    tile_token: jax.Ref  # the first


def _list_work(sizes, batch):
    """Fills the lists; returns how many decodes, units and tiles there are."""

    def sequence(s, counts):
        n_decodes, n_units, n_tiles = counts
        first, end = batch.offsets[s], batch.offsets[s + 1]
        n_new, length = end - first, batch.lengths[s]

        @pl.when(n_new == 1)
        def _():
            batch.decode_sequence[n_decodes] = s

        first_unit = length // sizes.unit
        first_token = first // sizes.token_align * sizes.token_align
        new_units = jnp.where(n_new > 1, pl.cdiv(length + n_new, sizes.unit) - first_unit, 0)
        new_tiles = jnp.where(n_new > 1, pl.cdiv(end - first_token, sizes.tile), 0)

        def unit(i, _):
            batch.unit_sequence[n_units + i] = s
            batch.unit[n_units + i] = first_unit + i
            return 0

        def tile(i, _):
            batch.tile_sequence[n_tiles + i] = s
            batch.tile_token[n_tiles + i] = first_token + i * sizes.tile
            return 0

        lax.fori_loop(0, new_units, unit, 0)
        lax.fori_loop(0, new_tiles, tile, 0)
        return n_decodes + (n_new == 1).astype(jnp.int32), n_units + new_units, n_tiles + new_tiles

    none = jnp.int32(0)
    return lax.fori_loop(0, sizes.S, sequence, (none, none, none))


@dataclasses.dataclass(frozen=True)
class _Span:
    """The pages that a decode or a tile attends to, and the positions whose slots hold something."""

    sequence: jax.Array
    first_page: jax.Array  # of the sequence
    n_pages: jax.Array
    start: jax.Array  # position of the first
    stop: jax.Array  # position behind the last


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The three loops, over the refs that they share."""

    sizes: _Sizes
    batch: _Batch
    pages: jax.Ref
    sinks: jax.Ref | None
    k_scale: jax.Ref  # [K], times the scale of the scores
    v_scale: jax.Ref
    counts: jax.Ref | None
    m: jax.Ref  # [K, rows, 128]: each row's maximum so far, all lanes the same,
    l: jax.Ref  # its sum,
    acc: jax.Ref  # [K, rows, v_lanes], and its weighted values

    # --- DMAs

    def start_pages(self, copy, elements, writing=False):
        """Starts a DMA from or to the pages."""
        copy.start()
        if self.counts is not None:
            at = int(writing)
            self.counts[at] = self.counts[at] + elements * self.sizes.cache_dtype.itemsize // 512

    def page_row(self, sequence, page):
        return self.batch.first_row[0] + self.batch.table[sequence * self.sizes.M + page]

    def block(self, span, b, slot, buffer, sem, start):
        """Starts, or waits for, the DMAs of block `b` of a span."""
        sizes = self.sizes
        first = b * sizes.block_pages

        def one_page(j, _):
            row = self.page_row(span.sequence, span.first_page + first + j)
            copy = pltpu.make_async_copy(self.pages.at[row], buffer.at[slot, j], sem.at[slot])
            if start:
                self.start_pages(copy, sizes.K * sizes.page_size * sizes.W)
            else:
                copy.wait()
            return 0

        lax.fori_loop(0, jnp.minimum(sizes.block_pages, span.n_pages - first), one_page, 0)

    # --- Writing chunks

    def write_chunks(self, n, kv_chunk):
        sizes, batch = self.sizes, self.batch
        unit = sizes.unit

        def body(new, run, new_sem, run_sem, out_sem):
            def place(i):
                s, position = batch.unit_sequence[i], batch.unit[i] * unit
                source = batch.offsets[s] + position - batch.lengths[s] + unit  # row of kv_chunk
                at = position % sizes.page_size
                slots = self.pages.at[self.page_row(s, position // sizes.page_size), :,
                                      pl.ds(pl.multiple_of(at, unit) if unit < sizes.page_size else at, unit)]
                return s, position, source, slots if unit < sizes.page_size else (
                    self.pages.at[self.page_row(s, position // sizes.page_size)])

            def fetches(i, slot):
                _, _, source, slots = place(i)
                rows = pl.ds(pl.multiple_of(source // 8 * 8, 8), unit + 8)
                return (pltpu.make_async_copy(kv_chunk.at[:, rows], new.at[slot], new_sem.at[slot]),
                        pltpu.make_async_copy(slots, run.at[slot], run_sem.at[slot]))

            def write_back(i, slot):
                return pltpu.make_async_copy(run.at[slot], place(i)[3], out_sem.at[slot])

            def fetch(i, slot):
                for_new, for_run = fetches(i, slot)
                for_new.start()
                self.start_pages(for_run, sizes.K * unit * sizes.W)

            @pl.when(n > 0)
            def _():
                fetch(0, 0)

            def step(i, carry):
                slot, other = i % 2, 1 - i % 2

                @pl.when(i > 0)
                def _():
                    write_back(i - 1, other).wait()

                @pl.when(i + 1 < n)
                def _():
                    fetch(i + 1, other)

                for copy in fetches(i, slot):
                    copy.wait()
                s, position, source, _ = place(i)
                shift = source % 8
                slots = position + lax.broadcasted_iota(jnp.int32, (unit, sizes.W), 0)
                length = batch.lengths[s]
                own = (slots >= length) & (slots < length + batch.offsets[s + 1] - batch.offsets[s])

                def head(h, carry):
                    # Rolled up by `shift` rows, with the rows that a roll brings round at the bottom.
                    rows = pltpu.roll(new[slot, h], (unit + 8 - shift) % (unit + 8), 0)[:unit]
                    run[slot, h] = self.to_cache(jnp.where(own, rows, run[slot, h].astype(jnp.float32)))
                    return carry

                lax.fori_loop(0, sizes.K, head, 0)
                self.start_pages(write_back(i, slot), sizes.K * unit * sizes.W, writing=True)
                return carry

            lax.fori_loop(0, n, step, 0)

            @pl.when(n > 0)
            def _():
                write_back(n - 1, (n - 1) % 2).wait()

        sem = pltpu.SemaphoreType.DMA((2,))
        pl.run_scoped(
            body,
            pltpu.VMEM((2, sizes.K, unit + 8, sizes.W), jnp.float32),
            pltpu.VMEM((2, sizes.K, unit, sizes.W), sizes.cache_dtype),
            sem, sem, sem,
        )  # fmt: skip

    def to_cache(self, x):
        """float32 values that the cache's dtype holds exactly, in that dtype."""
        if self.sizes.cache_dtype == jnp.int8:
            x = x.astype(jnp.int32)
        return x.astype(self.sizes.cache_dtype)

    # --- Attention

    def span(self, sequence, first, stop):
        """Of queries at positions [first, stop) of a sequence."""
        sizes = self.sizes
        start = jnp.int32(0)
        if sizes.sliding_window is not None:
            start = jnp.maximum(0, first - sizes.sliding_window + 1)
        oldest = start // sizes.page_size
        return _Span(sequence, oldest, pl.cdiv(stop, sizes.page_size) - oldest, start, stop)

    def sweep(self, n, span_of, load, begin, step, end, buffer, sem):
        """Runs `n` items block by block, each block's DMAs on the way while the one before it is computed.

        Args:
          span_of: item -> `_Span`.
          load: starts what else an item needs; it has the time of the item before.
          begin, end: (item, span), around an item's blocks.
          step: (item, span, position of the block's first slot, is it the last block, slot of the buffer).
        """
        sizes = self.sizes

        @pl.when(n > 0)
        def _():
            load(0)
            self.block(span_of(0), 0, 0, buffer, sem, start=True)

        def item(i, slot):
            span = span_of(i)
            n_blocks = pl.cdiv(span.n_pages, sizes.block_pages)
            begin(i, span)

            def block(b, slot):
                last = b + 1 == n_blocks

                @pl.when(jnp.logical_not(last))
                def _():
                    self.block(span, b + 1, 1 - slot, buffer, sem, start=True)

                @pl.when(last & (i + 1 < n))
                def _():
                    load(i + 1)
                    self.block(span_of(i + 1), 0, 1 - slot, buffer, sem, start=True)

                self.block(span, b, slot, buffer, sem, start=False)
                step(i, span, (span.first_page + b * sizes.block_pages) * sizes.page_size, last, slot)
                return 1 - slot

            slot = lax.fori_loop(0, n_blocks, block, slot)
            end(i, span)
            return slot

        lax.fori_loop(0, n, item, jnp.int32(0))

    def reset(self, rows, arrange):
        """Starts the statistics of `rows` rows a head; `arrange` makes those of sinks of a decode's."""

        def head(h, _):
            if self.sinks is None:
                self.m[h, :rows] = jnp.full((rows, LANES), NO_SCORE, jnp.float32)
                self.l[h, :rows] = jnp.zeros((rows, LANES), jnp.float32)
            else:
                self.m[h, :rows] = arrange(self.sinks[h])
                self.l[h, :rows] = jnp.ones((rows, LANES), jnp.float32)
            self.acc[h, :rows] = jnp.zeros((rows, self.sizes.v_lanes), jnp.float32)
            return 0

        lax.fori_loop(0, self.sizes.K, head, 0)

    def clear(self, buffer, slot, first, end, kept):
        """Zeroes slots of a block, in its pages [first, end): nothing times NaN would still be NaN.

        `kept` tells of slots, numbered from the block's first, which keep what they hold.
        """
        sizes = self.sizes
        if sizes.cache_dtype == jnp.int8:
            return

        def page(j, _):
            slots = j * sizes.page_size + lax.broadcasted_iota(jnp.int32, (sizes.page_size, sizes.W), 0)

            def head(h, _):
                x = jnp.where(kept(slots), buffer[slot, j, h].astype(jnp.float32), 0)
                buffer[slot, j, h] = x.astype(sizes.cache_dtype)
                return 0

            return lax.fori_loop(0, sizes.K, head, 0)

        lax.fori_loop(first, end, page, 0)

    def add_block(self, rows, q_of, position, span, first_slot, buffer, slot):
        """Adds a block to the statistics of `rows` rows a head.

        Args:
          q_of: head -> its queries [rows, k_lanes].
          position: of each row, int32[rows, step] or a scalar.
          first_slot: position of the block's first slot.
        """
        sizes = self.sizes
        # Not before a decode has merged its token: the tile that it writes back holds what others may need.
        filled = jnp.minimum(span.stop - first_slot, sizes.block)
        n_steps = pl.cdiv(filled, sizes.step)

        @pl.when(filled < n_steps * sizes.step)
        def _():
            first_unfilled = filled // sizes.page_size
            self.clear(buffer, slot, first_unfilled, n_steps * sizes.step_pages, lambda slots: slots < filled)

        if sizes.sliding_window is not None:

            @pl.when(first_slot < span.start)
            def _():
                self.clear(buffer, slot, 0, 1, lambda slots: slots >= span.start - first_slot)

        # Heads side by side hide each other's latencies; all of many would only be a long program.
        together = max(n for n in (1, 2, 4, 8) if (sizes.K % n == 0 and n * rows <= 512) or n == 1)

        def step(i, _):
            j = first_slot + i * sizes.step + lax.broadcasted_iota(jnp.int32, (rows, sizes.step), 1)
            seen = j <= position
            if sizes.sliding_window is not None:
                seen &= j > position - sizes.sliding_window

            def heads(g, _):
                for h in range(together):
                    self.add(g * together + h, rows, q_of, seen, buffer.at[slot, pl.ds(i * sizes.step_pages,
                                                                                       sizes.step_pages)])
                return 0

            return lax.fori_loop(0, sizes.K // together, heads, 0)

        lax.fori_loop(0, n_steps, step, 0)

    def add(self, h, rows, q_of, seen, pages):
        """Adds a step's slots, `pages` [step_pages, K, page_size, W], to the statistics of one head."""
        sizes = self.sizes
        dot = functools.partial(
            lax.dot_general,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if sizes.dtype == jnp.float32 else None,
        )

        def lanes(first, n):
            x = pages[:, h, :, pl.ds(first, n)]
            if sizes.cache_dtype.itemsize == 1:
                x = x.astype(jnp.float32)
            return x.astype(sizes.dtype).reshape(sizes.step, n)

        keys = lanes(0, sizes.k_lanes)
        if sizes.k_lanes > 2 * sizes.H:  # lanes that hold neither K nor V hold anything
            lane = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
            keys = jnp.where(lane < 2 * sizes.H, keys, 0)
        scores = self.k_scale[h] * dot(q_of(h), keys, (((1,), (1,)), ((), ())))
        if sizes.soft_cap is not None:
            scores = sizes.soft_cap * jnp.tanh(scores / sizes.soft_cap)
        scores = jnp.where(seen, scores, NO_SCORE)
        m, l = self.m[h, :rows], self.l[h, :rows]
        m_next = jnp.maximum(m, scores.max(1, keepdims=True))
        p = jnp.exp(scores - m_next[:, :1])
        shrink = jnp.exp(m - m_next)
        self.m[h, :rows] = m_next
        self.l[h, :rows] = shrink * l + p.sum(1, keepdims=True)
        added = dot(p.astype(sizes.dtype), lanes(sizes.v_first, sizes.v_lanes), (((1,), (0,)), ((), ())))
        self.acc[h, :rows] = shrink[:, :1] * self.acc[h, :rows] + added

    def result(self, h, rows):
        """A head's output [rows, v_lanes]."""
        return (self.acc[h, :rows] * (self.v_scale[h] / self.l[h, :rows][:, :1])).astype(self.sizes.dtype)

    # --- Decodes

    def decode(self, n, q_decode, kv_decode, out_decode):
        sizes, batch = self.sizes, self.batch
        rows, align = sizes.decode_rows, sizes.slot_align

        def body(buffer, q, new, out, merged, sem, q_sem, new_sem, out_sem, merged_sem):
            def span_of(i):
                s = batch.decode_sequence[i]
                return self.span(s, batch.lengths[s], batch.lengths[s] + 1)

            def token(i):
                return batch.offsets[batch.decode_sequence[i]]

            def loads(i):
                at = i % 2
                return (pltpu.make_async_copy(q_decode.at[token(i)], q.at[at], q_sem.at[at]),
                        pltpu.make_async_copy(kv_decode.at[token(i)], new.at[at], new_sem.at[at]))

            def load(i):
                for copy in loads(i):
                    copy.start()

            def storing(i):
                return pltpu.make_async_copy(out.at[i % 2], out_decode.at[token(i)], out_sem.at[i % 2])

            def writing_back(i):
                s = batch.decode_sequence[i]
                position = batch.lengths[s]
                rows = self.pages.at[self.page_row(s, position // sizes.page_size), :, tile_of(position)]
                return pltpu.make_async_copy(merged.at[i % 2], rows, merged_sem.at[i % 2])

            def wait_for(i):
                storing(i).wait()
                writing_back(i).wait()

            def tile_of(position):  # the packed rows of a page around a slot
                if align == sizes.page_size:
                    return slice(None)
                return pl.ds(pl.multiple_of(position % sizes.page_size // align * align, align), align)

            def begin(i, span):
                for copy in loads(i):
                    copy.wait()

                @pl.when(i > 1)
                def _():
                    wait_for(i - 2)

                self.reset(rows, lambda sinks: sinks)

            def merge(i, span, first_slot, slot):
                """Puts the new token into the block, and its packed rows on their way to the page."""
                at, filled = i % 2, span.stop - first_slot
                j = (filled - 1) // sizes.page_size
                tile = tile_of(span.stop - 1)
                row = lax.broadcasted_iota(jnp.int32, (align, sizes.W), 0)
                here = row == (span.stop - 1) % align

                def head(h, _):
                    index = (slot, j, h, tile)
                    token = jnp.broadcast_to(new[at, pl.ds(h, 1)], (align, sizes.W))
                    rows = self.to_cache(jnp.where(here, token, buffer[index].astype(jnp.float32)))
                    merged[at, h] = rows
                    buffer[index] = rows
                    return 0

                lax.fori_loop(0, sizes.K, head, 0)
                self.start_pages(writing_back(i), sizes.K * align * sizes.W, writing=True)

            def step(i, span, first_slot, last, slot):
                @pl.when(last)
                def _():
                    merge(i, span, first_slot, slot)

                self.add_block(rows, lambda h: q[i % 2, h], span.stop - 1, span, first_slot, buffer, slot)

            def end(i, span):
                def head(h, _):
                    out[i % 2, h] = self.result(h, rows)
                    return 0

                lax.fori_loop(0, sizes.K, head, 0)
                storing(i).start()

            self.sweep(n, span_of, load, begin, step, end, buffer, sem)
            for behind in (2, 1):

                @pl.when(n >= behind)
                def _(behind=behind):
                    wait_for(n - behind)

        dma = pltpu.SemaphoreType.DMA((2,))
        pl.run_scoped(
            body,
            self.block_buffer(),
            pltpu.VMEM((2, sizes.K, rows, sizes.k_lanes), sizes.dtype),
            pltpu.VMEM((2, _ceil(sizes.K, 8), sizes.W), jnp.float32),
            pltpu.VMEM((2, sizes.K, rows, sizes.v_lanes), sizes.dtype),
            pltpu.VMEM((2, sizes.K, align, sizes.W), sizes.cache_dtype),
            dma, dma, dma, dma, dma,
        )  # fmt: skip

    def block_buffer(self):
        sizes = self.sizes
        return pltpu.VMEM((2, sizes.block_pages, sizes.K, sizes.page_size, sizes.W), sizes.cache_dtype)

    # --- Tiles of chunks

    def attend_chunks(self, n, q_chunk, out_chunk):
        sizes, batch = self.sizes, self.batch
        rows = sizes.tile_rows

        def body(buffer, q, out, old, sem, q_sem, out_sem, old_sem):
            def tokens(i):
                return pl.ds(pl.multiple_of(batch.tile_token[i], sizes.token_align), sizes.tile)

            def own(i):  # a tile may begin before its sequence does, and end behind it
                s, token = batch.tile_sequence[i], batch.tile_token[i]
                return (jnp.maximum(token, batch.offsets[s]),
                        jnp.minimum(token + sizes.tile, batch.offsets[s + 1]))

            def to_position(i):
                s = batch.tile_sequence[i]
                return batch.lengths[s] - batch.offsets[s]

            def span_of(i):
                first, end = own(i)
                return self.span(batch.tile_sequence[i], first + to_position(i), end + to_position(i))

            def loading(i):
                return pltpu.make_async_copy(q_chunk.at[:, :, tokens(i)], q.at[i % 2], q_sem.at[i % 2])

            def storing(i):
                return pltpu.make_async_copy(out, out_chunk.at[:, :, tokens(i)], out_sem)

            def begin(i, span):
                loading(i).wait()

                def each_token(sinks):
                    each = [jnp.broadcast_to(sinks[g : g + 1], (sizes.tile, LANES)) for g in range(sizes.G)]
                    return jnp.concatenate(each)

                self.reset(rows, each_token)

            def step(i, span, first_slot, last, slot):
                token = lax.broadcasted_iota(jnp.int32, (rows, sizes.step), 0) & (sizes.tile - 1)
                position = token + batch.tile_token[i] + to_position(i)
                q_of = lambda h: q[i % 2, h].reshape(rows, sizes.k_lanes)  # noqa: E731
                self.add_block(rows, q_of, position, span, first_slot, buffer, slot)

            def end(i, span):
                first, stop = own(i)
                start = batch.tile_token[i]

                @pl.when(i > 0)
                def _():
                    storing(i - 1).wait()

                # Rows of other sequences stay as they are: they have been written, or will be.
                shared = (first > start) | (stop < start + sizes.tile)
                fetch_old = pltpu.make_async_copy(out_chunk.at[:, :, tokens(i)], old, old_sem)

                @pl.when(shared)
                def _():
                    fetch_old.start()
                    fetch_old.wait()

                token = start + lax.broadcasted_iota(jnp.int32, (sizes.G, sizes.tile, sizes.v_lanes), 1)
                its = (token >= first) & (token < stop)

                def head(h, _):
                    result = self.result(h, rows).reshape(sizes.G, sizes.tile, sizes.v_lanes)
                    out[h] = jnp.where(its, result, old[h])
                    return 0

                lax.fori_loop(0, sizes.K, head, 0)
                storing(i).start()

            self.sweep(n, span_of, lambda i: loading(i).start(), begin, step, end, buffer, sem)

            @pl.when(n > 0)
            def _():
                storing(n - 1).wait()

        dma = pltpu.SemaphoreType.DMA
        tile = (sizes.K, sizes.G, sizes.tile)
        pl.run_scoped(
            body,
            self.block_buffer(),
            pltpu.VMEM((2, *tile, sizes.k_lanes), sizes.dtype),
            pltpu.VMEM((*tile, sizes.v_lanes), sizes.dtype),
            pltpu.VMEM((*tile, sizes.v_lanes), sizes.dtype),
            dma((2,)), dma((2,)), dma, dma,
        )  # fmt: skip
