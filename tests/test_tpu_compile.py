"""The readers of compiled programs, on a program small enough to check by eye."""

import pytest

from tests.tpu_compile import Permute, count_collectives, loop_body, overlapped_permutes

PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,64]{1,0})->bf16[8,64]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner_product (x.0: bf16[8,64], w.0: bf16[64,64]) -> f32[8,64] {
  %x.0 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w.0 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.0 = f32[8,64]{1,0:T(8,128)} convolution(%x.0, %w.0), dim_labels=bf_oi->bf
}

%product (x.1: bf16[8,64], w.1: bf16[64,64]) -> f32[8,64] {
  %x.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion.0 = f32[8,64]{1,0:T(8,128)} fusion(%x.1, %w.1), kind=kOutput, calls=%inner_product
}

%scale (x.2: bf16[8,64]) -> bf16[8,64] {
  %x.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %multiply.2 = bf16[8,64]{1,0:T(8,128)(2,1)} multiply(%x.2, %x.2)
}

%inner_body (p.3: (bf16[8,64])) -> (bf16[8,64]) {
  %p.3 = (bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.3 = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.3), index=0
  %reduced.3 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%gte.3), replica_groups={{0,1}}, to_apply=%add
  ROOT %tuple.3 = (bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%reduced.3)
}

%always (p.4: (bf16[8,64])) -> pred[] {
  %p.4 = (bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %true.4 = pred[]{:T(512)} constant(true)
}

%outer_body (p.5: (bf16[8,64])) -> (bf16[8,64]) {
  %p.5 = (bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.5 = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.5), index=0
  %start.0 = (bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) collective-permute-start(%gte.5), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %scaled.5 = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%gte.5), kind=kLoop, calls=%scale
  %done.0 = bf16[8,64]{1,0:T(8,128)(2,1)} collective-permute-done(%start.0)
  %start.1 = (bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) collective-permute-start(%done.0), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %product.5 = f32[8,64]{1,0:T(8,128)} fusion(%scaled.5, %gte.5), kind=kOutput, calls=%product
  %start.2 = (bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[8,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) collective-permute-start(%scaled.5), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %kernel.5 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(%scaled.5), custom_call_target="tpu_custom_call"
  %buffer.5 = bf16[8,64]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %done.2 = bf16[8,64]{1,0:T(8,128)(2,1)} collective-permute-done(%start.2)
  %done.1 = bf16[8,64]{1,0:T(8,128)(2,1)} collective-permute-done(%start.1)
  %tuple.5 = (bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%done.1)
  ROOT %while.5 = (bf16[8,64]{1,0:T(8,128)(2,1)}) while(%tuple.5), condition=%always, body=%inner_body
}

%quiet_body (p.6: (bf16[8,64])) -> (bf16[8,64]) {
  ROOT %p.6 = (bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
}

ENTRY %main (p.7: bf16[8,64]) -> (bf16[8,64]) {
  %p.7 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %gathered.7 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%p.7), channel_id=4, dimensions={1}
  %tuple.7 = (bf16[8,64]{1,0:T(8,128)(2,1)}) tuple(%gathered.7)
  %quiet.7 = (bf16[8,64]{1,0:T(8,128)(2,1)}) while(%tuple.7), condition=%always, body=%quiet_body
  ROOT %while.7 = (bf16[8,64]{1,0:T(8,128)(2,1)}) while(%quiet.7), condition=%always, body=%outer_body
}
"""  # fmt: skip # noqa: E501


def test_collectives_are_counted_in_nested_loops_and_outside():
    assert count_collectives(PROGRAM) == {"collective-permute": 3, "all-reduce": 1, "all-gather": 1}
    assert count_collectives(loop_body(PROGRAM)) == {"collective-permute": 3, "all-reduce": 1}


def test_only_products_and_kernels_are_work():
    assert overlapped_permutes(loop_body(PROGRAM)) == [
        Permute("start.0", ()),
        Permute("start.2", ("kernel.5",)),
        Permute("start.1", ("product.5", "kernel.5")),
    ]


def test_the_loop_must_be_the_only_one_with_collectives():
    with pytest.raises(ValueError, match="0 of the program's outermost loops"):
        loop_body(PROGRAM.replace("body=%outer_body", "body=%quiet_body"))
    with pytest.raises(ValueError, match="2 of the program's outermost loops"):
        loop_body(PROGRAM.replace("body=%quiet_body", "body=%inner_body"))
