// Texts, answers, pictures and masks on standard input, what the C++ host makes of them on standard output; driven by
// test_host_cpp.py.
#pragma GCC diagnostic ignored "-Wreturn-type"  // main may do without a return, but has another name here
#define main host_main
#include "../export/hosts/cpp/paligemma.cpp"
#undef main

int main() {
  const auto asked = json::parse(std::cin);
  const Tokenizer tokenizer(asked.at("tokenizer").get<std::string>());
  const Picture picture(asked.at("picture").get<std::string>());
  json encoded = json::array(), decoded = json::array(), boxes = json::array(), masks = json::array();
  json pixels = json::array();
  for (const std::string file : asked.at("pictures")) pixels.push_back(Picture(file).rgb);
  for (const std::string text : asked.at("texts")) {
    Ids ids;
    tokenizer.encode(text, ids);
    encoded.push_back(ids);
    decoded.push_back(tokenizer.decode(ids));
  }
  for (const std::string text : asked.at("answers")) boxes.push_back(boxes_in(text, picture, {}));
  for (const json& mask : asked.at("masks")) {
    const int width = mask.at("width"), height = mask.at("height");
    const Floats values = mask.at("values");
    masks.push_back(json::array());
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++) masks.back().push_back(is_inside(values, x, y, width, height));
  }
  const json found = {{"encoded", encoded}, {"decoded", decoded}, {"boxes", boxes}, {"masks", masks}, {"pixels", pixels}};
  std::cout << found.dump() << "\n";
}
