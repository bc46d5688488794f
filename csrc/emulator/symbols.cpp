#include "emulator/symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>

namespace peftkern::emulator {
namespace {

// The file that this code was loaded from, and how far from its addresses.
struct Module {
  std::string path;
  uintptr_t bias;
};

const Module& module() {
  static const Module found = [] {
    Dl_info info;
    link_map* map;
    dladdr1(reinterpret_cast<void*>(&kernel_at), &info, reinterpret_cast<void**>(&map),
            RTLD_DL_LINKMAP);
    const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
    return Module{*map->l_name ? map->l_name : program, map->l_addr};
  }();
  return found;
}

struct Symbol {
  std::string name;
  char* begin;
  size_t bytes;
};

std::vector<Symbol> read_symbols() {
  std::ifstream file(module().path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  std::vector<Symbol> found;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[i].sh_offset);
    for (size_t k = 0; k < sections[i].sh_size / sizeof(ElfW(Sym)); ++k) {
      const int type = symbols[k].st_info & 15;
      if (type != STT_OBJECT && type != STT_FUNC) continue;
      found.push_back({names + symbols[k].st_name,
                       reinterpret_cast<char*>(module().bias + symbols[k].st_value),
                       symbols[k].st_size});
    }
  }
  if (found.empty()) throw std::runtime_error(module().path + " must keep its symbols, got none");
  return found;
}

std::string readable(const std::string& mangled) {
  int status;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  const std::string out = status == 0 ? text : mangled;
  std::free(text);
  return out;
}

Kernel find(const void* function) {
  static const std::vector<Symbol> symbols = read_symbols();
  Kernel kernel;
  std::string prefix;
  for (const Symbol& symbol : symbols) {
    if (symbol.begin != function || symbol.name.rfind("_Z", 0) != 0) continue;
    kernel.name = readable(symbol.name);
    prefix = "_ZZ" + symbol.name.substr(2) + "E";
  }
  if (prefix.empty()) throw std::runtime_error("a kernel must have a symbol, got none");
  for (const Symbol& symbol : symbols) {
    if (symbol.name.rfind(prefix, 0) != 0) continue;
    std::string name = symbol.name.substr(prefix.size());
    name.erase(0, name.find_first_not_of("0123456789"));
    kernel.shared.push_back({name, symbol.begin, symbol.bytes});
    kernel.shared_bytes += symbol.bytes;
  }
  return kernel;
}

}  // namespace

const Kernel& kernel_at(const void* function) {
  static std::map<const void*, Kernel> known;
  const auto at = known.find(function);
  return at != known.end() ? at->second : known.emplace(function, find(function)).first->second;
}

std::string line_of(const void* address) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - module().bias - 1;
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null",
                module().path.c_str(), static_cast<size_t>(offset));
  std::string out;
  if (FILE* lines = popen(command, "r")) {
    while (std::fgets(command, sizeof command, lines)) {
      command[std::strcspn(command, " \n")] = '\0';  // some lines end with a discriminator
      out += (out.empty() ? "" : ", inlined at ") + std::string(command);
    }
    pclose(lines);
  }
  return out.empty() ? module().path + "+" + std::to_string(offset) : out;
}

}  // namespace peftkern::emulator
