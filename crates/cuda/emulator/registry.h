// Kernels by name, and how they are called with a launch's parameters.
#pragma once
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace driver {

// A kernel with its parameters: what a thread runs, and the addresses among the parameters.
struct Bound {
  std::function<void()> call;
  std::vector<const void*> pointers;
};

struct Kernel {
  std::string name, unit;
  size_t parameters;
  Bound (*bind)(void (*function)(), void** parameters);
  void (*function)();
};

inline std::multimap<std::string, Kernel>& kernels() {
  static std::multimap<std::string, Kernel> all;
  return all;
}

template <class... A> struct Caller {
  template <class T> static T read(const void* from) {
    static_assert(std::is_trivially_copyable_v<T>);
    typename std::aligned_storage<sizeof(T), alignof(T)>::type raw;
    std::memcpy(&raw, from, sizeof(T));
    return *reinterpret_cast<T*>(&raw);
  }
  template <class T> static void note(const T& value, std::vector<const void*>& pointers) {
    if constexpr (std::is_pointer_v<T>) pointers.push_back(reinterpret_cast<const void*>(value));
  }
  template <size_t... I> static Bound with(void (*function)(A...), void** from, std::index_sequence<I...>) {
    auto values = std::make_shared<std::tuple<A...>>(read<A>(from[I])...);
    Bound bound;
    (note(std::get<I>(*values), bound.pointers), ...);
    bound.call = [function, values] { std::apply(function, *values); };
    return bound;
  }
  static Bound bind(void (*function)(), void** from) {
    return with(reinterpret_cast<void (*)(A...)>(function), from, std::index_sequence_for<A...>());
  }
};

// One for each kernel, made by build.sh.
struct Registered {
  template <class... A> Registered(const char* name, const char* unit, void (*function)(A...)) {
    kernels().emplace(name, Kernel{name, unit, sizeof...(A), &Caller<A...>::bind,
                                   reinterpret_cast<void (*)()>(function)});
  }
};

}  // namespace driver
