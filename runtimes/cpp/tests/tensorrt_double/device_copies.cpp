// Copies to the device and back, on the double of libcuda: nothing is lost where page-locked memory is used again.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

#include "tensorrt/cuda_device.h"

namespace {

using edgeprune::CudaDevice;
using edgeprune::Tensor;

// So many integers, counted up from a number.
Tensor numbers(int64_t first, size_t count) {
  std::vector<int64_t> values(count);
  for (size_t index = 0; index < count; ++index) values[index] = first + static_cast<int64_t>(index);
  return edgeprune::int64_tensor(values);
}

// Uploads them, spoils the memory that they came from, and goes on.
Tensor uploaded(CudaDevice& device, int64_t first, size_t count) {
  Tensor host = numbers(first, count);
  Tensor made = device.upload(host);
  for (size_t index = 0; index < count; ++index) host.data<int64_t>()[index] = -1;
  return made;
}

void expect_numbers(CudaDevice& device, const Tensor& tensor, int64_t first) {
  const Tensor read = device.download(tensor);
  for (int64_t index = 0; index < edgeprune::element_count(read.shape); ++index) {
    if (read.data<int64_t>()[index] != first + index) throw std::runtime_error("other numbers came back");
  }
}

// More in all than the page-locked memory holds, in sizes that do not divide it, and one that is larger than it.
void copy(CudaDevice& device, int64_t first) {
  const std::vector<size_t> counts = {1, 100000, 300001, 1, 400003, 700000, 200000, 5, 524288, 524289, 7};
  std::vector<Tensor> tensors;
  for (size_t index = 0; index < counts.size(); ++index) {
    tensors.push_back(uploaded(device, first + static_cast<int64_t>(index) * 1000000, counts[index]));
  }
  for (size_t index = 0; index < counts.size(); ++index) {
    expect_numbers(device, tensors[index], first + static_cast<int64_t>(index) * 1000000);
  }
}

}  // namespace

int main() {
  try {
    CudaDevice device;
    copy(device, 0);
    std::vector<std::thread> threads;
    for (int64_t thread = 1; thread <= 3; ++thread) {
      threads.emplace_back([&device, thread] {
        for (int64_t round = 0; round < 200; ++round) {
          const int64_t first = thread * 1000000 + round * 1000;
          const Tensor one = uploaded(device, first, 30011);
          const Tensor other = uploaded(device, -first, 17);
          expect_numbers(device, one, first);
          expect_numbers(device, other, -first);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
