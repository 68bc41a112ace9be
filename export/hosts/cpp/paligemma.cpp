// A PaliGemma bundle in C++: picture and prompt in, text, boxes and masks out. ../README.md says what it does, and why.
#include <cryptopp/files.h>
#include <cryptopp/hex.h>
#include <cryptopp/sha.h>
#include <onnxruntime_cxx_api.h>
#include <sentencepiece_processor.h>
#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;
using Ids = std::vector<int64_t>;
using Floats = std::vector<float>;
using Options = std::map<std::string, double>;
const std::string LOCATION = "<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>", CODE = "<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>";
const int LOCATIONS = 1024, CODES = 128, CODES_A_MASK = 16, SIDE = 64;  // of a mask as masks.onnx paints it
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// bundle.json, once every file that it lists has been found to be what it says.
json open_bundle(const fs::path& folder) {
  const auto bundle = json::parse(std::ifstream(folder / "bundle.json"), nullptr, false);
  if (!bundle.is_object() || bundle.value("format", "") != "paligemma-onnx" || bundle.value("version", 0) != 1)
    fail(folder.string() + ": not a bundle of version 1; export-onnx makes one");
  for (const auto& [name, file] : bundle.at("files").items()) {
    const auto path = folder / name;
    if (name.find_first_of("/\\") != std::string::npos || !fs::is_regular_file(path))
      fail(path.string() + ": this file of the bundle is missing, or outside; copy the bundle again");
    using namespace CryptoPP;  // whose filters own one another
    SHA256 hash;
    std::string digest;
    FileSource(path.c_str(), true, new HashFilter(hash, new HexEncoder(new StringSink(digest), false)));
    if (digest != file.at("sha256")) fail(path.string() + ": another SHA-256 than in bundle.json; copy it again");
  }
  return bundle.at("files").at("weights.bin"), bundle;  // throws if that has no checksum
}

struct Picture {
  int width, height, channels;
  std::vector<uint8_t> rgb;  // row by row
  // Transparent pixels are laid on white, with Pillow's rounding. stb_image does not turn pictures as EXIF data ask.
  explicit Picture(const std::string& file) {
    auto* rgba = stbi_load(file.c_str(), &width, &height, &channels, 4);
    if (!rgba) fail(file + ": not a picture, or a broken one (" + stbi_failure_reason() + ")");
    for (size_t i = 0; i < size_t(width) * height * 4; i++) {
      const int alpha = rgba[i | 3], sum = (rgba[i] * alpha + 255 * (255 - alpha) + 128) * 128;
      if (i % 4 < 3) rgb.push_back(uint8_t(((sum >> 8) + sum) >> 15));
    }
    stbi_image_free(rgba);
  }
};

struct Tokenizer {
  sentencepiece::SentencePieceProcessor library;
  std::map<std::string, int> ids;  // of location and segmentation tokens
  std::map<int, std::string> pieces;
  explicit Tokenizer(const fs::path& file) {
    if (!library.Load(file.string()).ok()) fail(file.string() + ": not a SentencePiece model");
    for (int i = 0; i < LOCATIONS + CODES; i++) {
      const auto number = std::to_string(i < LOCATIONS ? 10000 + i : 1000 + i - LOCATIONS).substr(1);
      const auto piece = (i < LOCATIONS ? "<loc" : "<seg") + number + ">";
      const int id = library.PieceToId(piece);  // Gemma's own file ends before these pieces
      pieces[ids[piece] = library.IdToPiece(id) == piece ? id : library.GetPieceSize() + i] = piece;
    }
  }
  // Appends the ids of a text, without bos or eos; <bos> and the like are spelled.
  void encode(const std::string& text, Ids& found) const {
    static const std::regex content(LOCATION + "|" + CODE);
    for (std::sregex_token_iterator part(text.begin(), text.end(), content, {-1, 0}), end; part != end; ++part)
      if (ids.count(*part)) found.push_back(ids.at(*part));
      else for (const int id : library.EncodeAsIds(part->str())) found.push_back(id);
  }
  // Text of ids; control tokens leave no trace.
  std::string decode(const Ids& tokens) const {
    std::string text;
    std::vector<int> run;
    for (const int id : tokens) {
      if (pieces.count(id)) text += library.DecodeIds(std::exchange(run, {})) + pieces.at(id);
      else if (id < library.GetPieceSize() && !library.IsControl(id) && !library.IsUnknown(id)) run.push_back(id);
    }
    return text + library.DecodeIds(run);
  }
};

// The boxes of an answer, read as numpy_ref/detection.py says; in `places` its tokens begin, with log-probabilities.
json boxes_in(const std::string& text, const Picture& picture, const std::multimap<size_t, float>& places) {
  const std::string blanks = " \t\n\v\f\r", blank = "[" + blanks + "]", either = "(?:" + LOCATION + "|" + CODE + ")";
  const std::string four = "(?:" + LOCATION + "){4}", rest = "(?:" + blank + "*(?!" + four + ")" + either + ")*";
  const std::regex object("(" + four + ")" + blank + "*((?:" + CODE + ")*)" + rest);
  const std::regex label_stop(blank + ";(?=" + blank + "|$)|;(?=" + blank + "*" + LOCATION + ")|" + either + "|$");
  const auto score = [&](size_t first, size_t last, size_t from, size_t to) {  // of tokens that begin in either span
    double sum = 0, count = 0;
    for (const auto& [begin, logprob] : places)
      if ((first <= begin && begin < last) || (from <= begin && begin < to)) sum += logprob, count++;
    return std::exp(sum / count);
  };
  auto found = json::array();
  for (std::sregex_iterator match(text.begin(), text.end(), object), none; match != none; ++match) {
    const size_t start = match->position(), end = match->position(2), mask_end = end + CODES_A_MASK * 8;  // of <seg000>
    const std::sregex_iterator stop((*match)[0].second, text.end(), label_stop);
    const size_t label = start + match->str().find_last_not_of(blanks) + 1, label_end = (*stop)[0].first - text.begin();
    std::istringstream words(text.substr(label, label_end - label));
    std::string name, word;
    while (words >> word) name += (name.empty() ? "" : " ") + word;
    const auto corner = [&](int i) { return std::stoi(text.substr(start + 9 * i + 4)) / 1023.0; };  // of <loc0000>
    json box = {{"label", name}, {"x1", corner(1) * picture.width}, {"y1", corner(0) * picture.height},
                {"x2", corner(3) * picture.width}, {"y2", corner(2) * picture.height}};
    for (size_t at = end; match->length(2) >= CODES_A_MASK * 8 && at < mask_end; at += 8)
      box["codes"].push_back(std::stoi(text.substr(at + 4)));
    box["score"] = score(start, start + match->length(1), label, name.empty() ? 0 : label_end);
    if (box.contains("codes")) box["mask_score"] = score(end, mask_end, 0, 0);
    found.push_back(box);
  }
  return found;
}

// Whether a mask [64, 64] stretched over width x height, linearly as by Pillow, is positive at x, y.
bool is_inside(const Floats& mask, int x, int y, int width, int height) {
  const double across = double(SIDE) / width, at_x = (x + 0.5) * across - 0.5, reach_x = std::max(across, 1.0);
  const double down = double(SIDE) / height, at_y = (y + 0.5) * down - 0.5, reach_y = std::max(down, 1.0);
  double sum = 0;
  for (int j = std::max(0, int(std::ceil(at_y - reach_y))); j < SIDE && j <= at_y + reach_y; j++)
    for (int i = std::max(0, int(std::ceil(at_x - reach_x))); i < SIDE && i <= at_x + reach_x; i++)
      sum += (1 - std::abs(i - at_x) / reach_x) * (1 - std::abs(j - at_y) / reach_y) * mask[j * SIDE + i];
  return sum > 0;
}

// Buffers have the names of the graphs' inputs and outputs and are bound once, so what one graph writes the next reads
// where it lies: logits, the drawn token, and the cache, which decode updates in place.
struct Model {
  fs::path folder;
  json bundle, tokens = bundle.at("tokens");
  Tokenizer tokenizer;
  Ort::Env environment{ORT_LOGGING_LEVEL_FATAL, "paligemma"};
  std::map<std::string, Ort::Session> sessions;
  std::map<std::string, Ort::Value> buffers;  // over memory of whoever put them there
  Model(const fs::path& folder) : folder(folder), bundle(open_bundle(folder)), tokenizer(folder / "tokenizer.model") {}
  template <class T> void put(const std::string& name, T* data, const Ids& shape) {
    size_t size = 1;
    for (const auto side : shape) size *= side;
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    buffers.insert_or_assign(name, Ort::Value::CreateTensor<T>(memory, data, size, shape.data(), shape.size()));
  }
  // A function that runs a graph over the buffers that are there now.
  std::function<void()> bound(const std::string& name) {
    const auto& graph = bundle.at("graphs").at(name);
    const std::string file = graph.at("file");
    if (!bundle.at("files").contains(file)) fail("bundle.json lists no checksum for " + file);
    Ort::SessionOptions options;
    if (name != "prefill" && name != "decode") options.SetIntraOpNumThreads(1);
    if (name == "prefill") options.AddConfigEntry("session.force_spinning_stop", "1");
    if (!sessions.count(name)) sessions.emplace(name, Ort::Session(environment, (folder / file).c_str(), options));
    auto& session = sessions.at(name);
    const auto binding = std::make_shared<Ort::IoBinding>(session);
    const auto key = [](const json& value) { return value.at("name").get<std::string>(); };
    for (const auto& input : graph.at("inputs")) binding->BindInput(key(input).c_str(), buffers.at(key(input)));
    for (const auto& output : graph.at("outputs")) binding->BindOutput(key(output).c_str(), buffers.at(key(output)));
    return [&session, binding] { session.Run({}, *binding); };
  }
  // The tokens of an answer and their log-probabilities, without the token that ends it.
  std::pair<Ids, Floats> generate(Picture& picture, Ids prompt, Options options) {
    const auto& text = bundle.at("config").at("text_config");
    const int64_t size = bundle.at("image").at("size"), vocab = text.at("vocab_size");
    const Ids stops = tokens.contains("stops") ? tokens.at("stops").get<Ids>() : Ids{tokens.at("eos")};
    int64_t capacity = int64_t(prompt.size() + options["max-new-tokens"]) - 1, token, top_k = int64_t(options["top-k"]);
    int32_t length = int32_t(prompt.size());
    float uniform, logprob, temperature = float(options["temperature"]), top_p = float(options["top-p"]);
    Floats pixels(3 * size * size), logits(vocab), logprobs;
    put("image", picture.rgb.data(), {picture.height, picture.width, 3});
    put("pixel_values", pixels.data(), {1, 3, size, size}), put("input_ids", prompt.data(), {1, length});
    put("lengths", &length, {1}), put("capacity", &capacity, {}), put("logits", logits.data(), {1, vocab});
    put("temperature", &temperature, {}), put("top_p", &top_p, {}), put("top_k", &top_k, {});
    put("uniform", &uniform, {1}), put("token", &token, {1}), put("logprob", &logprob, {1});
    const Ids shape = {1, text.at("num_key_value_heads"), capacity, text.at("head_dim")};
    std::vector<Floats> cache(2 * text.at("num_hidden_layers").get<size_t>(), Floats(shape[1] * shape[2] * shape[3]));
    for (size_t i = 0; i < cache.size(); i++)
      for (const std::string kind : {"present.", "past_key_values."})
        put(kind + std::to_string(i / 2) + (i % 2 ? ".value" : ".key"), cache[i].data(), shape);
    const auto preprocess = bound("preprocess"), prefill = bound("prefill"), sample = bound("sample");
    put("input_ids", &token, {1, 1});
    const auto decode = bound("decode");
    std::mt19937 random(unsigned(options.at("seed")));
    preprocess(), prefill();
    for (Ids drawn;; decode(), length++) {
      uniform = float(random() >> 8) * 0x1p-24f;  // as NumPy draws float32 of its MT19937
      sample();
      if (std::count(stops.begin(), stops.end(), token)) return {drawn, logprobs};
      drawn.push_back(token), logprobs.push_back(logprob);
      if (length == capacity) return {drawn, logprobs};
    }
  }
  json answer(Picture picture, const std::string& question, Options options) {
    Ids prompt(tokens.at("image_tokens").get<size_t>(), tokens.at("image").get<int64_t>());
    prompt.push_back(tokens.at("bos"));
    tokenizer.encode(question, prompt), tokenizer.encode("\n", prompt);
    const double room = bundle.at("max_length").get<double>() + 1 - double(prompt.size());
    if (room < 1) fail("the prompt exceeds the capacity of " + bundle.at("max_length").dump() + "; shorten it");
    options["max-new-tokens"] = std::clamp(options["max-new-tokens"], 1.0, room);
    const auto [drawn, logprobs] = generate(picture, prompt, options);
    const std::string text = tokenizer.decode(drawn);
    std::multimap<size_t, float> places;
    for (size_t i = 0, whole = 0; i < drawn.size(); i++) {
      const std::string before = tokenizer.decode({drawn.begin(), drawn.begin() + i});
      if (text.rfind(before, 0) == 0) whole = before.size();  // or half a character ends it
      places.emplace(whole, logprobs[i]);
    }
    json boxes = boxes_in(text, picture, places), masks = json::array();
    for (const auto& box : boxes)
      if (box.contains("codes")) masks.push_back(bundle.at("graphs").contains("masks") ? outlined(box, picture) : box);
    return {{"text", text}, {"tokens", drawn}, {"logprobs", logprobs}, {"boxes", boxes}, {"masks", masks}};
  }
  // A box with its mask: COCO's uncompressed run lengths over the picture, column by column.
  json outlined(json box, const Picture& picture) {
    Ids codes = box["codes"], counts = {0};
    Floats mask(SIDE * SIDE);
    put("codes", codes.data(), {1, CODES_A_MASK}), put("masks", mask.data(), {1, SIDE, SIDE}), bound("masks")();
    const int x1 = box["x1"], y1 = box["y1"], x2 = box["x2"], y2 = box["y2"];  // cut off to whole pixels
    for (int x = 0; x < picture.width; x++)
      for (int y = 0; y < picture.height; y++) {
        const bool is_in_box = x1 <= x && x < x2 && y1 <= y && y < y2, is_one = counts.size() % 2 == 0;
        if ((is_in_box && is_inside(mask, x - x1, y - y1, x2 - x1, y2 - y1)) != is_one) counts.push_back(0);
        counts.back()++;
      }
    return box["size"] = {picture.height, picture.width}, box["counts"] = counts, box;
  }
};

int main(int argc, char** argv) try {
  Options given{{"max-new-tokens", 64}, {"temperature", 0}, {"top-p", 1}, {"top-k", 0}, {"seed", 0}};
  bool is_json = false, ok = argc > 3 && *argv[3];
  for (int i = 4; i < argc; i++) {
    std::string key = argv[i];
    if (key == "--json") is_json = true;
    else ok &= ++i < argc && given.count(key.erase(0, 2)) && sscanf(argv[i], "%lf", &given[key]) > 0 && given[key] >= 0;
  }
  if (!ok) return std::cerr << "usage: paligemma BUNDLE IMAGE PROMPT [--json] [--max-new-tokens N] [--seed S]\n"
                                     "       [--temperature T] [--top-p P] [--top-k K]\n", 2;
  const auto found = Model(argv[1]).answer(Picture(argv[2]), argv[3], given);
  std::cout << (is_json ? found.dump() : found["text"].get<std::string>()) << "\n";
} catch (const std::exception& error) {
  const auto about = dynamic_cast<const json::exception*>(&error) ? "bundle.json is damaged; export it again: " : "";
  std::cerr << "paligemma: error: " << about << std::regex_replace(error.what(), std::regex("\\s+"), " ") << "\n";
  return 1;
}
