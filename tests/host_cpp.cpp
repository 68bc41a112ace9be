// Texts, answers and masks on standard input, what the C++ host makes of them on standard output; driven by
// test_host_cpp.py.
#define main host_main
#include "../export/hosts/cpp/paligemma.cpp"
#undef main

int main() {
  const auto asked = json::parse(std::cin);
  const Tokenizer tokenizer(asked.at("tokenizer").get<std::string>());
  const Picture picture(asked.at("picture"));
  json encoded = json::array(), decoded = json::array(), boxes = json::array(), masks = json::array();
  for (const std::string text : asked.at("texts")) {
    Ids ids;
    tokenizer.encode(text, ids);
    encoded.push_back(ids);
    decoded.push_back(tokenizer.decode(ids));
  }
  for (const std::string text : asked.at("answers")) boxes.push_back(boxes_in(text, picture, {}));
  for (const json& mask : asked.at("masks")) {
    const int width = mask.at("width"), height = mask.at("height");
    masks.push_back(json::array());
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++) masks.back().push_back(is_inside(mask.at("values"), x, y, width, height));
  }
  std::cout << json{{"encoded", encoded}, {"decoded", decoded}, {"boxes", boxes}, {"masks", masks}}.dump() << "\n";
}
