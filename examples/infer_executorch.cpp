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

// A binary PPM of the model's size and 8 bits a number, [height, width, 3].
static std::vector<unsigned char> picture(const char* path, int width, int height) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int w = 0, h = 0, most = 0;
  file >> kind >> w >> h >> most;
  file.get();
  if (kind != "P6" || w != width || h != height || most != 255)
    throw std::runtime_error(std::string(path) + " is no binary PPM of " + std::to_string(width) + " x " + std::to_string(height) + " whose largest value is 255");
  std::vector<unsigned char> rgb(3 * w * h);
  if (!file.read(reinterpret_cast<char*>(rgb.data()), rgb.size())) throw std::runtime_error(std::string(path) + " ends early");
  return rgb;
}

static void infer(const char* model, const char* path) {
  Module module(model);
  const auto said = module.execute("slimvit");
  if (!said.ok()) throw std::runtime_error(std::string(model) + " cannot be read, or does not tell how pictures become its input");
  if (module.load_method("forward") != executorch::runtime::Error::Ok) throw std::runtime_error(std::string(model) + " has no method forward that loads here");
  const std::string told(said->at(0).toString());
  const auto size = numbers(told, "input_size"), mean = numbers(told, "mean"), std = numbers(told, "std");
  const int channels = size[0], height = size[1], width = size[2];
  if (channels != 3) throw std::runtime_error("a model of three channels is wanted");
  const auto rgb = picture(path, width, height);
  std::vector<float> image(rgb.size());  // [3, height, width]
  for (int c = 0; c < 3; ++c)
    for (int i = 0; i < width * height; ++i) image[c * width * height + i] = (rgb[3 * i + c] / 255.0f - mean[c]) / std[c];
  const auto result = module.forward(from_blob(image.data(), {1, 3, height, width}));
  if (!result.ok()) throw std::runtime_error(std::string(model) + " does not run");
  const auto logits = result->at(0).toTensor();
  for (int i = 0; i < logits.numel(); ++i) std::printf("%d %.6f\n", i, logits.const_data_ptr<float>()[i]);
}

int main(int argc, char** argv) {
  try {
    if (argc != 3) throw std::invalid_argument("usage: infer_executorch model.pte picture.ppm");
    infer(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
