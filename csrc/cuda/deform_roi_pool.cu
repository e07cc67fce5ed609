// Deformable RoI pooling on CUDA, forward: one launch over all levels.

#include "deform_roi_pool.cuh"

namespace d2det {
namespace roi_pool {

void check_arguments(const std::vector<Tensor>& features, const Tensor& rois, const Tensor& levels,
                     const std::optional<Tensor>& offset, const std::optional<Tensor>& modulation,
                     int64_t output_size, const std::vector<double>& spatial_scales,
                     int64_t sampling_ratio) {
  D2DET_CHECK(!features.empty() && features.size() == spatial_scales.size(),
              "features and spatial_scales must have one entry for each level, got ",
              features.size(), " and ", spatial_scales.size());
  D2DET_CHECK(features.size() <= kMaxLevels, "at most ", kMaxLevels, " levels, got ",
              features.size());
  D2DET_CHECK(features[0].dim() == 4, "features must have 4 dimensions, got ",
              shape_text(features[0]));
  for (const Tensor& f : features) {
    check_floating("features", f, {features[0].size(0), features[0].size(1), -1, -1}, features[0]);
    D2DET_CHECK(f.scalar_type() == features[0].scalar_type(), "features must share one dtype");
    D2DET_CHECK(f.size(2) > 0 && f.size(3) > 0, "a level is empty: ", shape_text(f));
    D2DET_CHECK(f.size(2) * f.size(3) < (int64_t{1} << 31),
                "a level is too large: ", shape_text(f));
  }
  D2DET_CHECK(features[0].size(0) < (int64_t{1} << 31), "too many images");
  check_floating("rois", rois, {-1, 5}, features[0]);
  check_indices("levels", levels, rois.size(0), features[0]);
  D2DET_CHECK(output_size > 0 && output_size < (1 << 15), "output_size must be in 1..32767, got ",
              output_size);
  D2DET_CHECK(sampling_ratio > 0 && sampling_ratio <= 256,
              "sampling_ratio must be in 1..256 on a GPU, got ", sampling_ratio);
  if (offset) {
    check_floating("offset", *offset, {rois.size(0), 2, output_size, output_size}, features[0]);
  }
  if (modulation) {
    check_floating("modulation", *modulation, {rois.size(0), 1, output_size, output_size},
                   features[0]);
  }
}

Tables make_tables(ScalarType type, const Tensor& rois, const Tensor& levels,
                   const std::optional<Tensor>& offset, const std::optional<Tensor>& modulation) {
  Tables tables;
  tables.rois = as(rois, type);
  tables.levels = as(levels, ScalarType::Long);
  if (offset) tables.offset = as(*offset, type);
  if (modulation) tables.modulation = as(*modulation, type);
  return tables;
}

}  // namespace roi_pool

namespace {

using namespace roi_pool;

// Each group of blockDim.x threads takes one bin at a time and V channels a thread.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    pool_channels_last(const __grid_constant__ Levels levels,
                       const __grid_constant__ Arguments<Accumulate<T>> args, T* output) {
  using A = Accumulate<T>;
  D2DET_DYNAMIC_SHARED(unsigned char, memory);
  const Taps<A> table(memory, args.block_bins, args.points);
  const int vectors = blockDim.x;
  const Stage<T, V> stage{
      reinterpret_cast<T*>(memory + taps_bytes<A>(args.block_bins, args.points)),
      args.block_bins | 1, vectors};
  const Place<A> place(levels, args);
  const Level& level = levels.at[place.level];
  fill_taps(table, place, level, args);

  const int64_t area = static_cast<int64_t>(args.side) * args.side;
  const T* image = static_cast<const T*>(level.features) +
                   static_cast<int64_t>(place.image) * level.height * level.width * args.channels;
  for (int first = 0; first < args.channels; first += vectors * V) {
    const int channel = first + threadIdx.x * V;
    for (int bin = threadIdx.y; channel < args.channels && bin < place.bins; bin += blockDim.y) {
      A sum[V] = {};
      const Tap<A>* y = table.of(bin, 0);
      const Tap<A>* x = table.of(bin, 1);
      const int rows = table.count(bin, 0), columns = table.count(bin, 1);
      for (int i = 0; i < rows; ++i) {
#pragma unroll 4
        for (int j = 0; j < columns; ++j) {
          const int64_t pixel = y[i].index + x[j].index;
          const A weight = y[i].weight * x[j].weight;
          const Vector<T, V> value = load_constant<V>(image + pixel * args.channels + channel);
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] += weight * to_float(value.data[k]);
        }
      }
      if (args.modulation != nullptr) {
        const A scale = args.modulation[place.roi * area + place.first_bin + bin];
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] *= scale;
      }
      if (args.channels_last) {
        Vector<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) result.data[k] = from_float<T>(sum[k]);
        store_vector(output + (place.roi * area + place.first_bin + bin) * args.channels + channel,
                     result);
      } else {
#pragma unroll
        for (int k = 0; k < V; ++k) stage.at(threadIdx.x, k, bin) = from_float<T>(sum[k]);
      }
    }
    if (!args.channels_last) {
      __syncthreads();
      stage.move_all(place, args, first, min(vectors * V, args.channels - first),
                     [&](T& staged, int64_t index) { output[index] = staged; });
      __syncthreads();
    }
  }
}

// Reads maps as they are, channel by channel, where there are too few RoIs to repay a copy of the
// maps. Neighbouring threads take neighbouring bins of one channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_channels_first(const __grid_constant__ Levels levels,
                        const __grid_constant__ Arguments<Accumulate<T>> args, T* output) {
  using A = Accumulate<T>;
  D2DET_DYNAMIC_SHARED(unsigned char, memory);
  const Taps<A> table(memory, args.block_bins, args.points);
  const Place<A> place(levels, args);
  const Level& level = levels.at[place.level];
  fill_taps(table, place, level, args);

  const int64_t area = static_cast<int64_t>(args.side) * args.side;
  const int64_t plane = static_cast<int64_t>(level.height) * level.width;
  const int bin = threadIdx.x;
  if (bin >= place.bins) return;
  const Tap<A>* y = table.of(bin, 0);
  const Tap<A>* x = table.of(bin, 1);
  const int rows = table.count(bin, 0), columns = table.count(bin, 1);
  const A scale =
      args.modulation == nullptr ? A(1) : args.modulation[place.roi * area + place.first_bin + bin];
  // The channels are spread over blockIdx.y too: with few RoIs there would be few blocks.
  for (int channel = blockIdx.y * blockDim.y + threadIdx.y; channel < args.channels;
       channel += gridDim.y * blockDim.y) {
    const T* map = static_cast<const T*>(level.features) +
                   (static_cast<int64_t>(place.image) * args.channels + channel) * plane;
    A sum = 0;
    for (int i = 0; i < rows; ++i) {
#pragma unroll 4
      for (int j = 0; j < columns; ++j) {
        sum += y[i].weight * x[j].weight * to_float(map[y[i].index + x[j].index]);
      }
    }
    output[(place.roi * args.channels + channel) * area + place.first_bin + bin] =
        from_float<T>(sum * scale);
  }
}

// Whether pooling from NCHW maps reads less than a copy of the maps would read and write.
bool reads_little(const std::vector<Tensor>& features, int64_t rois, int64_t side, int64_t points) {
  int64_t pixels = 0;
  for (const Tensor& f : features) {
    if (!f.is_contiguous()) return false;
    pixels += f.size(0) * f.size(2) * f.size(3);
  }
  return rois * side * side * 4 * points * points < pixels;
}

template <typename T, int V>
void launch_channels_last(const Levels& levels, const Arguments<Accumulate<T>>& args,
                          Tensor& output) {
  const dim3 block = block_shape(args.channels / V);
  const size_t shared = taps_bytes<Accumulate<T>>(args.block_bins, args.points) +
                        stage_bytes(args, block.x, V * sizeof(T));
  D2DET_LAUNCH((pool_channels_last<T, V>),
               static_cast<unsigned>(args.rois_count * args.block_tiles), block, shared,
               current_stream(output), levels, args, output.mutable_data_ptr<T>());
}

Tensor deform_roi_pool(const std::vector<Tensor>& features, const Tensor& rois,
                       const Tensor& levels, const std::optional<Tensor>& offset,
                       const std::optional<Tensor>& modulation, int64_t output_size,
                       const std::vector<double>& spatial_scales, int64_t sampling_ratio,
                       double gamma, std::string convention) {
  check_arguments(features, rois, levels, offset, modulation, output_size, spatial_scales,
                  sampling_ratio);
  const Tensor& first = features[0];
  D2DET_DEVICE_GUARD(first);
  Tensor output = new_output(first, {rois.size(0), first.size(1), output_size, output_size});
  if (output.numel() == 0) return output;
  if (first.size(0) == 0) {  // whatever image the RoIs mean, it is not there
    torch::stable::fill_(output, std::nan(""));
    return output;
  }
  const ScalarType type = accumulation_type(first.scalar_type());
  const Tables tables = make_tables(type, rois, levels, offset, modulation);
  const bool output_channels_last = is_channels_last(output) && !output.is_contiguous();
  const bool direct =
      !output_channels_last && reads_little(features, rois.size(0), output_size, sampling_ratio);
  std::vector<Tensor> maps = features;
  Levels table{};
  for (size_t i = 0; i < maps.size(); ++i) {
    if (!direct && !is_channels_last(maps[i])) {
      maps[i] = torch::stable::contiguous(maps[i], MemoryFormat::ChannelsLast);
    }
    table.at[i] = {maps[i].const_data_ptr(), nullptr, static_cast<int32_t>(maps[i].size(2)),
                   static_cast<int32_t>(maps[i].size(3)), spatial_scales[i]};
  }
  dispatch_floating(first.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    constexpr int V = kVectorSize<T>;
    const Arguments<A> args = make_arguments<A>(maps, tables, output_size, sampling_ratio, gamma,
                                                convention, output_channels_last);
    if (direct) {
      const dim3 block(32, kThreads / 32);
      const auto grid = static_cast<unsigned>(args.rois_count * args.block_tiles);
      const auto split = static_cast<unsigned>(ceil_div(args.channels, 8 * block.y));
      D2DET_LAUNCH((pool_channels_first<T>), dim3(grid, std::min(split, 65535u)), block,
                   taps_bytes<A>(args.block_bins, args.points), current_stream(first), table, args,
                   output.mutable_data_ptr<T>());
    } else if (args.channels % V == 0 && all_aligned(maps)) {
      launch_channels_last<T, V>(table, args, output);
    } else {
      launch_channels_last<T, 1>(table, args, output);
    }
  });
  return output;
}

}  // namespace

D2DET_CUDA_LIBRARY_IMPL(m) { m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool)); }

}  // namespace d2det
