// Mean and variance of a result that lies in memory as rows of channels, in a pass of its own: where the blocks of the
// kernel that made it are no runs of positions, or do not end where images do.
#pragma once

#include "csrc/ops/conv_bn_relu/conv_bn_relu_cpu_normalize.h"

namespace ptk::PTK_ISA {

// Mean and biased variance of the `groups` groups of channels of every one of `images` images of `space` pixels.
template <class A>
static void merge_groups(const A* blocks, int64_t channels, int64_t rows, int64_t images, int64_t space, int64_t groups,
                         A* mean, A* variance) {
  const int64_t per_image = (space + rows - 1) / rows, width = channels / groups;
  parallel_items(images * groups, [&](int64_t i) {
    double centre = 0, m2 = 0, seen = 0;
    const A* block = blocks + i / groups * per_image * 2 * channels + i % groups * width;
    for (int64_t begin = 0; begin < space; begin += rows, block += 2 * channels) {
      const double here = static_cast<double>(least(rows, space - begin));
      for (int64_t c = 0; c < width; ++c) {
        const double all = seen + here, delta = static_cast<double>(block[c]) - centre;
        centre += delta * (here / all);
        m2 += static_cast<double>(block[channels + c]) + delta * delta * (seen * here / all);
        seen = all;
      }
    }
    mean[i] = static_cast<A>(centre);
    variance[i] = static_cast<A>(m2 / seen);
  });
}

// Statistics of what lies in memory as rows of channels, in a pass of its own: of every channel, or with norm_groups of
// every group of an image. False when memory ran out.
template <class T, class A = Acc<T>>
static bool result_statistics(const ConvProblem& p, const T* rows, A* mean, A* variance) {
  constexpr int64_t kRows = 64;
  const int64_t channels = p.out_channels, images = p.norm_groups ? p.batch : 1;
  const int64_t pixels = p.batch * volume(p.out) / images, per_image = (pixels + kRows - 1) / kRows;
  const SharedBuffer statistics(images * per_image * 2 * channels * static_cast<int64_t>(sizeof(A)));
  if (!statistics) return false;
  parallel_items(images * per_image, [&](int64_t i) {
    const int64_t first = i % per_image * kRows, begin = i / per_image * pixels + first;
    A* to = statistics.as<A>() + i * 2 * channels;
    block_statistics(rows + begin * channels, channels, least(kRows, pixels - first), channels, to, to + channels);
  });
  if (p.norm_groups) {
    merge_groups(statistics.as<A>(), channels, kRows, images, pixels, p.norm_groups, mean, variance);
  } else {
    merge_statistics(statistics.as<A>(), channels, kRows, pixels, pixels, mean, variance);
  }
  return true;
}

}  // namespace ptk::PTK_ISA
