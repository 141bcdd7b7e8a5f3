// Runs a package of AOTInductor that calls operators of ptkernels; there is no Python in this process.
//
//     run MODEL.pt2 INPUTS.pt OUTPUTS.pt     inputs as a list from torch.save, outputs as a tuple for torch.load

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

static std::vector<at::Tensor> load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<at::Tensor> tensors;
  const c10::IValue list = torch::jit::pickle_load(bytes);
  for (const c10::IValue& value : list.toListRef()) {
    tensors.push_back(value.toTensor());
  }
  return tensors;
}

static void save(const char* path, const std::vector<at::Tensor>& tensors) {
  // A tuple: torch.load takes no list of the type that a vector of tensors would become.
  std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
  std::ofstream file(path, std::ios::binary);
  file.exceptions(std::ios::failbit | std::ios::badbit);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 INPUTS.pt OUTPUTS.pt\n", arguments[0]);
    return 2;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    save(arguments[3], model.run(load(arguments[2])));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
