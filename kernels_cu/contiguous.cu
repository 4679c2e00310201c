// A contiguous copy of a matrix of any strides, element by element.
//
// Launch     any grid.
#include "layout.cuh"

namespace ep {

struct ContiguousCfg {
    int num_threads;
};

template <ContiguousCfg kCfg>
struct ContiguousArgs {
    const uint8_t* source;
    uint8_t* destination;
    int64_t num_rows, num_columns, row_stride_bytes, column_stride_bytes;
    int32_t element_bytes;  // 1, 2, 4 or 8
};

template <class T, ContiguousCfg kCfg>
__device__ void copy_elements(const ContiguousArgs<kCfg>& args) {
    const int64_t num_elements = args.num_rows * args.num_columns;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kCfg.num_threads + threadIdx.x;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kCfg.num_threads;
    auto* destination = reinterpret_cast<T*>(args.destination);
    for (int64_t i = first; i < num_elements; i += step) {
        const int64_t row = i / args.num_columns, column = i - row * args.num_columns;
        destination[i] = *reinterpret_cast<const T*>(args.source + row * args.row_stride_bytes +
                                                     column * args.column_stride_bytes);
    }
}

template <ContiguousCfg kCfg>
__device__ void contiguous(const ContiguousArgs<kCfg>& args) {
    switch (args.element_bytes) {
        case 1:
            return copy_elements<uint8_t>(args);
        case 2:
            return copy_elements<unsigned short>(args);
        case 4:
            return copy_elements<uint32_t>(args);
        default:
            return copy_elements<uint64_t>(args);
    }
}

}  // namespace ep
