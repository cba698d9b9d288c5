"""FLOPs and bytes counted in HLO: what XLA compiles here, and cuBLAS calls as it wrote them."""

import _hlo as hlo
import pytest
from moeconv_train.preflight.aot import rematerialised

# Shortened from the train step compiled for a T4.
CUBLAS = """\
HloModule jit_step, is_scheduled=true

%fused (p.1: f16[8192,2304]) -> f16[8192,2304] {
  %p.1 = f16[8192,2304]{1,0} parameter(0)
  ROOT %neg.1 = f16[8192,2304]{1,0} negate(%p.1)
}

ENTRY %main (a: f16[8192,768], b: f16[768,2304]) -> f16[8192,2304] {
  %a = f16[8192,768]{1,0} parameter(0)
  %b = f16[768,2304]{1,0} parameter(1)
  %gemm.1.remat = (f16[8192,2304]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/dot_general"}, \
backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],\
"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"precision_config":{}},"x":{}}
  %out = f16[8192,2304]{1,0} get-tuple-element(%gemm.1.remat), index=0
  ROOT %f = f16[8192,2304]{1,0} fusion(%out), kind=kLoop, calls=%fused
}
"""


def compiled(function, *shapes, dtype="float32") -> str:
    import jax

    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_cublas_call():
    counts = hlo.count(CUBLAS)
    assert counts.flops == {"f16": 2 * 8192 * 768 * 2304}
    gemm = 2 * (8192 * 768 + 768 * 2304 + 8192 * 2304) + 4194304
    fusion = 2 * 2 * 8192 * 2304
    assert counts.traffic == gemm + fusion
    assert not counts.unknown and not counts.loops


def test_matmuls_by_their_types():
    (gemm,) = hlo.matmuls(CUBLAS)
    assert gemm.operands == ("f16[8192,768]", "f16[768,2304]")
    assert gemm.result == "f16[8192,2304]"
    assert (gemm.algorithm, gemm.flops) == ("ALG_UNSET", 2 * 8192 * 768 * 2304)
    named = CUBLAS.replace('"precision_config":{}', '"precision_config":{"algorithm":"ALG_X"}')
    assert hlo.matmuls(named)[0].algorithm == "ALG_X"


def test_another_custom_call_is_named():
    counts = hlo.count(CUBLAS.replace("__cublas$lt$matmul", "__cudnn$fmhaSoftmax"))
    assert counts.unknown == {"__cudnn$fmhaSoftmax"} and not counts.flops


def test_what_xla_recomputes_is_seen():
    assert rematerialised(CUBLAS)
    assert not rematerialised(CUBLAS.replace(".remat", ""))


def test_matmuls_of_a_compiled_function():
    text = compiled(lambda a, b, c: (a @ b) @ c, (8, 16), (16, 32), (32, 4))
    assert hlo.count(text).flops == {"f32": 2 * 8 * 16 * 32 + 2 * 8 * 32 * 4}


def test_a_loops_body_counts_as_often_as_it_runs():
    import jax

    def function(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    counts = hlo.count(compiled(function, (8, 16), (5, 16, 16)))
    assert counts.flops == {"f32": 5 * 2 * 8 * 16 * 16}
    assert counts.loops == 0


def test_the_dearer_branch_of_a_conditional_counts():
    import jax

    def function(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w, lambda: x @ w)

    counts = hlo.count(compiled(function, (8, 16), (16, 16)))
    assert counts.flops == {"f32": 2 * 2 * 8 * 16 * 16}


def test_traffic_is_operands_and_results():
    text = compiled(lambda a, b: a @ b, (128, 256), (256, 512))
    assert hlo.count(text).traffic >= 4 * (128 * 256 + 256 * 512 + 128 * 512)


def test_text_that_is_not_hlo():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.count("nothing")


SUMS = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (a: f16[512], b: f32[256]) -> f32[256] {
  %a = f16[512]{0} parameter(0)
  %b = f32[256]{0} parameter(1)
  %all-reduce-start.1 = ((f16[512]{0}, f32[256]{0}), (f16[512]{0}, f32[256]{0})) \
all-reduce-start(%a, %b), channel_id=1, to_apply=%add
  %neg.1 = f32[256]{0} negate(%b)
  %view.1 = f32[16,16]{1,0} bitcast(%neg.1)
  %neg.2 = f32[16,16]{1,0} negate(%view.1)
  %all-reduce-done.1 = (f16[512]{0}, f32[256]{0}) all-reduce-done(%all-reduce-start.1)
  %all-reduce.2 = f16[512]{0} all-reduce(%a), channel_id=2, to_apply=%add
  ROOT %out = f32[256]{0} get-tuple-element(%all-reduce-done.1), index=1
}
"""


def test_sums_between_devices():
    """What each sends by type, and the kernels that hide it: a bitcast is none."""
    hidden, waits = hlo.all_reduces(SUMS)
    assert hidden.bytes == {"f16": 1024, "f32": 1024} and hidden.behind == 2
    assert waits.bytes == {"f16": 1024} and waits.behind is None
    assert hlo.sent(SUMS.replace("512", "5000000")) == "20 f16, 10 waits"
