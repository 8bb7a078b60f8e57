// Attention over exact keys and cluster moments on the CPU: `cluster_attention` of kernels/cluster.py, forward and backward.
//
// A pass is two parallel regions: runs are cut into clusters, then blocks of queries (forward) or heads (backward) are
// taken from one counter by ATen's threads, so that a thread that another process slows down takes fewer of them.
// Everything of a block stays in the cache of its core: products are the BLAS's that PyTorch brings (single-threaded
// inside of a parallel region), all between them is fused here.
//
// Letters: b samples, h heads, g = h / h_kv heads per key head, n keys in runs of R, clusters of L keys, C = clusters of
// all runs, Q blocks of up to R queries, d and v features of keys and values (multiples of kLanes), r coordinates,
// f = r (r + 1) / 2 pairs of them (0 at order 0), o = 1 + r value moments per cluster (1 below order 2).
//
// Top-down: forward.h, backward.h and step.h; query_block.h, own_clusters.h and highest.h, which both work with; clusters.h;
// problem.h; dropout.h, products.h and vectors.h. All is one translation unit, so that the compiler knows every caller.

#include <torch/library.h>

#include "backward.h"
#include "forward.h"
#include "step.h"

TORCH_LIBRARY(approx_attn_cpu, library) {
  library.def("has_bfloat16_products() -> bool", &tiles_available);
  library.def(
      "cluster_forward(Tensor query, Tensor key, Tensor value, Tensor query_map, Tensor key_map, Tensor? key_open, "
      "Tensor plan, bool causal, int offset, int window, int run, int cluster, int order, "
      "float dropout_p, int seed, int most) -> Tensor[]",
      &forward);
  library.def(
      "cluster_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor query_map, Tensor key_map, "
      "Tensor? key_open, Tensor plan, Tensor output, Tensor lse, Tensor own, Tensor members, Tensor centre, "
      "Tensor moments, Tensor spread, Tensor log_count, bool causal, int offset, int window, int run, int cluster, "
      "int order, float dropout_p, int seed) -> Tensor[]",
      &backward);
  library.def(
      "cluster_step(Tensor query, Tensor key, Tensor value, Tensor query_map, Tensor? key_open, Tensor members, "
      "Tensor centre, Tensor values, Tensor spread, Tensor log_count, Tensor spans, int position, int first, int window) "
      "-> Tensor",
      &step);
}
