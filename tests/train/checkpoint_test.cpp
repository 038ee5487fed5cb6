// Checkpoints: whole or not there, damage found, older ones taken instead.
#include "train/checkpoint.hpp"

#include <gtest/gtest.h>

#include "models/io.hpp"
#include "train/helpers.hpp"

namespace kalmanet::train {
namespace {

namespace fs = std::filesystem;
using test::read_all;
using test::write_text;

struct Fixture {
  Fixture() {
    torch::manual_seed(5);
    model = models::HybridLanguageModel(test::tiny_config());
    for (const auto& item : model->named_parameters()) {
      parameters.emplace_back(item.key(), item.value());
    }
    optimizer = std::make_unique<AdamW>(parameters, AdamWOptions{});
  }
  void train_one_step() {
    for (auto& [name, p] : parameters) p.mutable_grad() = torch::randn_like(p);
    optimizer->step(1e-2);
    ++state.step;
    state.windows += 12;
  }
  fs::path save(int64_t keep = 3) {
    return save_checkpoint(folder.path(), model, *optimizer, state, keep);
  }

  TemporaryFolder folder;
  models::HybridLanguageModel model{nullptr};
  AdamW::NamedTensors parameters;
  std::unique_ptr<AdamW> optimizer;
  TrainingState state;
};

TEST(Checkpoint, HoldsModelMomentsAndRandomStateBitForBit) {
  Fixture f;
  f.state.data = "some-text";
  f.state.options.lr = 1.0 / 7;
  f.train_one_step();
  f.train_one_step();
  const fs::path folder = f.save();
  const at::Tensor expected_random = torch::rand({5});

  const auto found = find_checkpoint(f.folder.path());
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->folder, folder);
  EXPECT_EQ(found->state.step, 2);
  EXPECT_EQ(found->state.windows, 24);
  EXPECT_EQ(found->state.data, "some-text");
  EXPECT_EQ(found->state.options.lr, 1.0 / 7);
  EXPECT_EQ(fs::canonical(f.folder.path() / "latest"), fs::canonical(folder));

  models::HybridLanguageModel loaded = models::load_model(folder);
  AdamW::NamedTensors parameters;
  for (const auto& item : loaded->named_parameters()) {
    parameters.emplace_back(item.key(), item.value());
  }
  for (const auto& [name, p] : f.parameters) {
    EXPECT_TRUE(loaded->named_parameters()[name].equal(p)) << name;
  }
  AdamW optimizer(parameters, {});
  load_training_tensors(folder, optimizer);
  EXPECT_EQ(optimizer.steps_taken(), 2);
  const auto saved = f.optimizer->state(), restored = optimizer.state();
  ASSERT_EQ(saved.size(), restored.size());
  for (size_t i = 0; i < saved.size(); ++i) {
    EXPECT_EQ(saved[i].first, restored[i].first);
    EXPECT_TRUE(saved[i].second.equal(restored[i].second)) << saved[i].first;
  }
  EXPECT_TRUE(torch::rand({5}).equal(expected_random));
}

TEST(Checkpoint, KeepsTheNewestOnes) {
  Fixture f;
  for (int i = 0; i < 4; ++i) {
    f.train_one_step();
    f.save(2);
  }
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(f.folder.path() / "checkpoints")) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"step-00000003", "step-00000004"}));
}

TEST(Checkpoint, AnUnfinishedOneIsNeverSeen) {
  Fixture f;
  f.train_one_step();
  const fs::path good = f.save();
  fs::copy(good, f.folder.path() / "checkpoints" / "step-00000009.tmp");
  EXPECT_EQ(find_checkpoint(f.folder.path())->state.step, 1);
  f.train_one_step();
  f.save();
  EXPECT_FALSE(fs::exists(f.folder.path() / "checkpoints" / "step-00000009.tmp"));
}

// What can happen to a file, and the words that must name it.
TEST(Checkpoint, DamageIsFoundAndTheOneBeforeTaken) {
  struct Damage {
    const char* file;
    void (*apply)(const fs::path&);
    const char* message;
  };
  const std::vector<Damage> damages = {
      {"model.safetensors", [](const fs::path& p) { fs::remove(p); }, "is missing"},
      {"model.safetensors", [](const fs::path& p) { fs::resize_file(p, fs::file_size(p) - 1); },
       "bytes instead of"},
      {"optimizer.safetensors",
       [](const fs::path& p) {
         std::string bytes = read_all(p);
         bytes[bytes.size() / 2] ^= 0x10;
         write_text(p, bytes);
       },
       "has changed"},
      {"config.json", [](const fs::path& p) { write_text(p, ""); }, "bytes instead of"},
      {"training.json", [](const fs::path& p) { write_text(p, "{\"format\": 1,"); }, "parse"},
      {"training.json", [](const fs::path& p) { write_text(p, "{\"format\": 99}"); }, "format"},
      {"training.json", [](const fs::path& p) { fs::remove(p); }, "training.json"},
  };
  for (const Damage& damage : damages) {
    SCOPED_TRACE(std::string(damage.file) + " " + damage.message);
    Fixture f;
    f.train_one_step();
    const fs::path first = f.save();
    f.train_one_step();
    const fs::path second = f.save();
    damage.apply(second / damage.file);
    const auto found = find_checkpoint(f.folder.path());
    ASSERT_TRUE(found.has_value());
    EXPECT_EQ(found->folder, first);
    ASSERT_EQ(found->skipped.size(), 1u);
    EXPECT_NE(found->skipped[0].find(damage.message), std::string::npos) << found->skipped[0];
    damage.apply(first / damage.file);
    EXPECT_THROW(find_checkpoint(f.folder.path()), std::runtime_error);
    // Going on from the first and reaching the second's step again replaces the damaged one.
    f.state.step = 1;
    f.train_one_step();
    EXPECT_EQ(f.save(), second);
    EXPECT_NO_THROW(verify_checkpoint(second));
  }
}

TEST(Checkpoint, AFailedWriteLeavesTheOldOnesAndNoTrace) {
  Fixture f;
  f.train_one_step();
  const fs::path good = f.save();
  f.train_one_step();
  // A file where the folder of the new one would be made aside cannot be removed by name clashes,
  // so block the whole folder instead: no permission does not stop root, a file in the way does.
  const fs::path run = f.folder.path() / "other";
  write_text(run / "checkpoints", "in the way");
  EXPECT_ANY_THROW(save_checkpoint(run, f.model, *f.optimizer, f.state, 2));
  EXPECT_EQ(find_checkpoint(f.folder.path())->folder, good);
}

TEST(Checkpoint, ResolvesModelFoldersAndRuns) {
  Fixture f;
  f.train_one_step();
  const fs::path folder = f.save();
  EXPECT_EQ(resolve_model_folder(folder), folder);
  EXPECT_EQ(resolve_model_folder(f.folder.path()), folder);
  EXPECT_THROW(resolve_model_folder(f.folder.path() / "nothing"), std::runtime_error);
  EXPECT_THROW(resolve_model_folder(folder / ".." / ".." / "checkpoints"), std::runtime_error);
}

TEST(Checkpoint, TensorsOfAnotherModelAreRefused) {
  Fixture f;
  f.train_one_step();
  const fs::path folder = f.save();
  AdamW::NamedTensors other = {{"model.norm.weight", torch::zeros({3}).requires_grad_()}};
  AdamW optimizer(other, {});
  EXPECT_THROW(load_training_tensors(folder, optimizer), std::runtime_error);
}

}  // namespace
}  // namespace kalmanet::train
