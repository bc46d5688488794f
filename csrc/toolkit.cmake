# Finds what compiles CUDA, and decides for which GPUs; a toolkit is enough, no GPU and no torch that
# is built for one are needed.
#
# Sets for people cuda_taken, which says what was taken or why nothing was, cuda_version and
# cuda_names, the architectures; and for CMake, where there is a toolkit, CMAKE_CUDA_COMPILER,
# CMAKE_CUDA_HOST_COMPILER and CMAKE_CUDA_ARCHITECTURES.
cmake_policy(VERSION 3.22)  # run by itself, it inherits none

# A cubin runs on its own architecture and the later ones of the same major version: 8.0 on 8.6 and
# 8.9, 10.0 on 10.3, 12.0 on 12.1; 9.0a on 9.0, which has no later one. So these are all that are
# sold from 8.0 on but 11.0, which like what is yet to come runs the PTX of 8.0. Code made for 8.6
# and 8.9 alone would hold nothing that 8.0 lacks and take half as long again to compile.
set(default_architectures "8.0+PTX;9.0a;10.0;12.0")
set(oldest_architecture 80)  # the first with cp.async and with mma in bf16

unset(CMAKE_CUDA_COMPILER)
unset(CMAKE_CUDA_COMPILER CACHE)
macro(take_none reason)
  if(PEFTKERN_CUDA STREQUAL "on")
    message(FATAL_ERROR "peftkern: ${reason}, and PEFTKERN_CUDA is on")
  endif()
  set(cuda_taken "no CUDA kernels: ${reason}")
  set(cuda_version "none")
  set(cuda_names "")
  set(CMAKE_CUDA_ARCHITECTURES "")
  return()
endmacro()

if(PEFTKERN_CUDA STREQUAL "off")
  take_none("PEFTKERN_CUDA is off")
elseif(NOT PEFTKERN_CUDA MATCHES "^(on|auto)$")
  message(FATAL_ERROR "peftkern: PEFTKERN_CUDA must be on, off or auto, got ${PEFTKERN_CUDA}")
endif()

# Looked for at every configuration: it may be another one by now.
find_program(nvcc nvcc NO_CACHE PATH_SUFFIXES bin
  HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda)
if(NOT nvcc)
  take_none("nvcc must be in CUDA_HOME, PATH or /usr/local/cuda, got none")
endif()
execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE said ERROR_QUIET)
string(REGEX MATCH "V([0-9]+\\.[0-9]+\\.[0-9]+)" said "${said}")
set(cuda_version "${CMAKE_MATCH_1}")
if(NOT cuda_version OR cuda_version VERSION_LESS 12.0)
  take_none("nvcc must be 12.0 or newer, the first to know C++20, got '${said}' from ${nvcc}")
endif()

# Of TORCH_CUDA_ARCH_LIST where there is one: versions and torch's names for some, apart by spaces or
# semicolons. What is older than our kernels' instructions is left out: the list may serve others.
set(names_of_Ampere 8.0 8.6+PTX)
set(names_of_Ada 8.9+PTX)
set(names_of_Hopper 9.0+PTX)
set(names_of_Blackwell 10.0 12.0+PTX)
string(REGEX REPLACE "[ ,]+" ";" listed "$ENV{TORCH_CUDA_ARCH_LIST}")
execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known)
string(REGEX MATCHALL "[0-9]+" known "${known}")
set(wanted "")
foreach(entry IN LISTS listed)
  if(DEFINED names_of_${entry})
    set(entry ${names_of_${entry}})
  endif()
  list(APPEND wanted ${entry})
endforeach()
if(NOT wanted)
  set(wanted ${default_architectures})
endif()
set(CMAKE_CUDA_ARCHITECTURES "")
set(cuda_names "")
foreach(entry IN LISTS wanted)
  if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)([+]PTX)?$")
    message(FATAL_ERROR "peftkern: TORCH_CUDA_ARCH_LIST must list versions such as 8.0 and 9.0a+PTX "
      "or names from Ampere on, got ${entry}")
  endif()
  set(number ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  if(number LESS oldest_architecture)
    continue()
  elseif(NOT number IN_LIST known)
    if(NOT listed)
      continue()
    endif()
    message(FATAL_ERROR
      "peftkern: TORCH_CUDA_ARCH_LIST must list what nvcc ${cuda_version} compiles, got ${entry}")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}${CMAKE_MATCH_3}-real)
  if(CMAKE_MATCH_4)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}${CMAKE_MATCH_3}-virtual)
  endif()
  string(APPEND cuda_names " sm_${number}${CMAKE_MATCH_3}${CMAKE_MATCH_4}")
endforeach()
if(NOT cuda_names)
  take_none("TORCH_CUDA_ARCH_LIST must list a version from 8.0 on, got $ENV{TORCH_CUDA_ARCH_LIST}")
endif()
string(STRIP "${cuda_names}" cuda_names)

# Whether it works here, and with this C++ compiler, which may be newer than it can bear; CMake would
# stop where it does not.
if(DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER $ENV{CUDAHOSTCXX})
else()
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
set(probe ${CMAKE_BINARY_DIR}/CMakeFiles/probe.cu)
file(WRITE ${probe} "__global__ void probe(float* x) { x[threadIdx.x] = 1; }\n")
execute_process(
  COMMAND ${nvcc} -std=c++20 -ccbin ${CMAKE_CUDA_HOST_COMPILER} -arch=sm_80 -cudart=static -shared
    -Xcompiler=-fPIC ${probe} -o ${probe}.so
  RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(failed)
  string(REGEX MATCH "[^\n]*(error|rror:)[^\n]*" said "${said}")
  take_none("nvcc ${cuda_version} in ${nvcc} must compile with ${CMAKE_CUDA_HOST_COMPILER}, got '${said}'")
endif()
set(CMAKE_CUDA_COMPILER ${nvcc})
set(cuda_taken "CUDA kernels for ${cuda_names} by nvcc ${cuda_version}")
