// Classifies a picture by a .pte file that slimvit wrote, prepared as the file itself says: ExecuTorch 1.5, C++17.
//
//     infer_executorch model.pte picture.ppm
//
// The picture is a binary PPM of the model's size; scale and crop it first, by `crop_pct` and `interpolation` of the JSON.
// CONTRIBUTING's environment compiles it against the wheel: tests/e2e/test_example_executorch.py has the line.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

using namespace executorch::extension;

// The numbers of `"key": [a, b, c]`. A real program has a JSON library for it.
static std::vector<float> numbers(const std::string& json, const std::string& key) {
  size_t at = json.find("\"" + key + "\": [");
  if (at == std::string::npos) throw std::runtime_error("the file does not tell its " + key);
  std::vector<float> found;
  for (at = json.find('[', at); json[at] != ']'; at = json.find_first_of(",]", at + 1)) found.push_back(std::stof(json.substr(at + 1)));
  return found;
}

int main(int argc, char** argv) {
  if (argc != 3) throw std::invalid_argument("model.pte picture.ppm");
  Module module(argv[1]);
  const std::string told(module.execute("slimvit")->at(0).toString());
  const auto size = numbers(told, "input_size"), mean = numbers(told, "mean"), std = numbers(told, "std");
  const int channels = size[0], height = size[1], width = size[2];
  std::ifstream file(argv[2], std::ios::binary);
  std::string kind;
  int w = 0, h = 0, most = 0;
  file >> kind >> w >> h >> most;
  file.get();
  if (kind != "P6" || w != width || h != height || channels != 3) throw std::runtime_error("a PPM of the model's size is wanted");
  std::vector<unsigned char> rgb(3 * w * h);
  file.read(reinterpret_cast<char*>(rgb.data()), rgb.size());
  std::vector<float> image(rgb.size());  // [3, height, width]
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < w * h; ++i) image[c * w * h + i] = (rgb[3 * i + c] / 255.0f - mean[c]) / std[c];
  const auto result = module.forward(from_blob(image.data(), {1, 3, h, w}));
  if (!result.ok()) throw std::runtime_error("the file does not run");
  const auto logits = result->at(0).toTensor();
  for (int i = 0; i < logits.numel(); ++i) std::printf("%d %.6f\n", i, logits.const_data_ptr<float>()[i]);
}
