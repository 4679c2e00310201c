// The end of a two-level combine: the sum of what the nodes sent back. Of one rank alone.
//
// Sum        float32, left to right: the rows of the nodes in ascending order, each of them a sum that was
//            rounded, bias 0, bias 1; one rounding at the end. It starts from its first term, so that a -0.0
//            stays; a token without any term is +0.0.
// Launch     any number of blocks.
#include "layout.cuh"
#include "rows.cuh"

namespace ep {

struct InternodeSumCfg {
    int num_threads, element;
};

template <InternodeSumCfg kCfg>
struct InternodeSumArgs {
    const SlabHeader* header;  // of this rank's slab
    Workspace* workspace;
    const NetworkPlan* plan;
    const int32_t* positions;  // [num_tokens, num_nodes], see internode_layout.cu
    const uint8_t* here;       // rows of all segments, summed over the ranks of this node
    const uint8_t* returned;   // rows from the other nodes
    const float *here_weights, *returned_weights;
    const uint8_t* bias[2];                                    // [num_tokens] rows, or nullptr
    uint8_t* out;                                              // [num_tokens] rows
    float* out_weights;                                        // [num_tokens, num_topk]
    int32_t node, num_nodes, num_tokens, row_bytes, num_topk;  // num_topk 0: no weights
};

// Calls `term(is_here, row)` for each node that a token went to.
template <InternodeSumCfg kCfg, class Term>
__device__ void each_term(const InternodeSumArgs<kCfg>& args, int32_t token, Term term) {
    for (int32_t n = 0; n < args.num_nodes; ++n) {
        const int32_t position = args.positions[int64_t{token} * args.num_nodes + n];
        if (position < 0) continue;
        const NetworkPlan& plan = *args.plan;
        const bool is_here = n == args.node;
        term(is_here, int64_t{is_here ? plan.segments.first[n] + token : plan.returned_first[n] + position});
    }
}

template <InternodeSumCfg kCfg>
__device__ void internode_sum(const InternodeSumArgs<kCfg>& args) {
    // Rows of a call that was given up are not there.
    if (ptx::ld_relaxed_gpu(&args.header->failed) != 0) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) args.workspace->returning = 0;  // the exchange has ended
    constexpr int kDepth = 4;  // vectors of a lane that are on their way together, for each term
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    const int32_t per_row = args.row_bytes / rows::kVectorBytes;
    const int32_t pieces_per_row = (per_row + kDepth * kWarpSize - 1) / (kDepth * kWarpSize);
    const int64_t stride = int64_t{gridDim.x} * kCfg.num_threads;
    const int64_t begin = int64_t{blockIdx.x} * kCfg.num_threads + threadIdx.x;
    const int64_t num_pieces = int64_t{args.num_tokens} * pieces_per_row;
    for (int64_t piece = begin / kWarpSize; piece < num_pieces; piece += stride / kWarpSize) {
        const auto token = static_cast<int32_t>(piece / pieces_per_row);
        const int32_t first = static_cast<int32_t>(piece % pieces_per_row) * kDepth * kWarpSize + lane;
        float sum[kDepth][rows::kVectorElements<kCfg.element>];
        bool has_term = false;
#pragma unroll
        for (auto& vector : sum)
            for (float& element : vector) element = rows::kNoTerm;
        const auto add = [&](const uint8_t* base, int64_t row) {
            const auto* vectors = reinterpret_cast<const uint4*>(base) + row * per_row;
            uint4 values[kDepth];
#pragma unroll
            for (int v = 0; v < kDepth; ++v) {
                const int32_t i = first + v * kWarpSize;
                values[v] = i < per_row ? ptx::ld_stream(vectors + i) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int v = 0; v < kDepth; ++v) rows::add<kCfg.element>(sum[v], values[v]);
            has_term = true;
        };
        each_term(args, token,
                  [&](bool is_here, int64_t row) { add(is_here ? args.here : args.returned, row); });
        for (const uint8_t* bias : args.bias)
            if (bias != nullptr) add(bias, token);
        auto* out = reinterpret_cast<uint4*>(args.out) + int64_t{token} * per_row;
#pragma unroll
        for (int v = 0; v < kDepth; ++v) {
            if (!has_term)
                for (float& element : sum[v]) element = 0.0f;
            const int32_t i = first + v * kWarpSize;
            if (i < per_row) ptx::st_stream(out + i, rows::rounded<kCfg.element>(sum[v]));
        }
    }
    for (int64_t i = begin; i < int64_t{args.num_tokens} * args.num_topk; i += stride) {
        const int32_t token = static_cast<int32_t>(i / args.num_topk);
        const int32_t k = static_cast<int32_t>(i % args.num_topk);
        float sum = rows::kNoTerm;
        bool has_term = false;
        each_term(args, token, [&](bool is_here, int64_t row) {
            sum += (is_here ? args.here_weights : args.returned_weights)[row * args.num_topk + k];
            has_term = true;
        });
        args.out_weights[i] = has_term ? sum : 0.0f;
    }
}

}  // namespace ep
